//! Log lines: to standard error, and to the host's journal where there is one.

use clap::ValueEnum;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{EnvFilter, Layer as _};

/// How log lines on standard error look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging can't be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter can't be read.
    #[error("LOG_LEVEL={filter:?} is no filter, such as info or debug")]
    Filter {
        /// What was given.
        filter: String,
        /// Why.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Something logs already.
    #[error("logging can't be started")]
    Started(#[from] TryInitError),
}

/// Starts logging. With `journal`, what the lines are found by there (`journalctl -t`), they also go to journald's native socket if the
/// host has one; fields keep their names, in capitals.
pub fn start(filter: &str, format: Format, journal: Option<&str>) -> Result<(), Error> {
    // What kube says about failing calls is in the errors that are logged here, once, with what was to be done.
    let parsed = EnvFilter::try_new(format!("kube_client=off,{filter}"))
        .map_err(|source| Error::Filter { filter: filter.to_owned(), source })?;
    let text = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let stderr = match format {
        Format::Text => text.with_ansi(false).boxed(),
        Format::Json => text.json().flatten_event(true).boxed(),
    };
    // Absent in a container whose host has no systemd, or where the socket isn't mounted.
    let journald = journal.and_then(|identifier| {
        let layer = tracing_journald::layer().ok()?;
        // The usual levels of syslog: "notice" for every line would hide what is notable.
        let levels = PriorityMappings {
            info: Priority::Informational,
            debug: Priority::Debug,
            ..PriorityMappings::new()
        };
        Some(
            layer
                .with_syslog_identifier(identifier.to_owned())
                .with_field_prefix(None)
                .with_priority_mappings(levels),
        )
    });
    tracing_subscriber::registry().with(parsed).with(stderr).with(journald).try_init()?;
    Ok(())
}

/// An error with its sources, in one line. A source that the text ends with already isn't said twice.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let said = inner.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_read_is_named() {
        let error = start("info,=x=", Format::Text, None).unwrap_err();
        assert!(error.to_string().contains(r#"LOG_LEVEL="info,=x=""#), "{error}");
    }
}
