//! What is in the way of a migration, or worth knowing, with its remedy.

use std::fmt;

use serde::Serialize;

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// A person must change something, then run again: waiting won't help.
    Fatal,
    /// In the way now; looked at again until it is gone.
    Blocking,
    /// In the way of one node or of its pods: the others go on without it, and it is tried again.
    HoldsNode,
    /// Worth knowing.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fatal => "fatal",
            Self::Blocking => "blocking",
            Self::HoldsNode => "holds-node",
            Self::Warning => "warning",
        })
    }
}

impl Severity {
    /// Whether the migration can't begin.
    #[must_use]
    pub fn stops(self) -> bool {
        matches!(self, Self::Fatal | Self::Blocking)
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Finding {
    /// How much it weighs.
    pub severity: Severity,
    /// Stable name, `CamelCase`.
    pub reason: &'static str,
    /// The object it is about: kind and name, or the environment variable.
    pub object: String,
    /// What was found.
    pub found: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    /// Waiting won't help.
    pub fn fatal(
        reason: &'static str,
        object: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Fatal,
            reason,
            object: object.into(),
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    /// In the way now.
    pub fn blocking(
        reason: &'static str,
        object: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Blocking, ..Self::fatal(reason, object, found, remedy) }
    }

    /// In the way of one node.
    pub fn holds_node(
        reason: &'static str,
        object: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::HoldsNode, ..Self::fatal(reason, object, found, remedy) }
    }

    /// Worth knowing.
    pub fn warning(
        reason: &'static str,
        object: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { severity: Severity::Warning, ..Self::fatal(reason, object, found, remedy) }
    }
}

impl Finding {
    /// Whether it says that flannel's configuration isn't known.
    pub(crate) fn is_about_config(&self) -> bool {
        self.reason == "NotDetected"
            && (self.object.starts_with("ConfigMap") || self.object.starts_with("Secret"))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}. {}", self.reason, self.object, self.found, self.remedy)
    }
}
