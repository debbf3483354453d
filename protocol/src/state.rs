//! The state of a node, as its agent reports it, and which DaemonSets the coordinator lets run there.

use std::fmt;
use std::str::FromStr;

/// Text that names no known variant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not one of {known}")]
pub struct Unknown {
    /// What was read.
    pub text: String,
    /// What would have been understood.
    pub known: &'static str,
}

/// State of a node. Each variant says what is true while the label carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Rest. The node's network is flannel's, whole; nothing of ours or of Calico's is on the host.
    Flannel,
    /// The agent examines the node. Nothing on the host is changed but the journal.
    Preparing,
    /// The node is fit, the originals are in the journal, the report lists the pods to evict. Nothing on the host is changed.
    /// Safe to wait in, for as long as it takes.
    Prepared,
    /// The host is being changed. Bounded, wholly in the agent's hands, needs no API.
    Switching,
    /// The host is set up for Calico and every adopted pod is connected through it; `adopted` lists them. Flannel's packet
    /// filter rules still stand. Calico may start.
    Verifying,
    /// Rest. The node's network is Calico's, verified with traffic; nothing of flannel is on the host.
    Calico,
    /// The switch is to be undone, or is being undone: the agent first waits until calico-node is gone.
    Reverting,
    /// Neither migrated nor undone; the report says what a person must do. Keeps its slot and stops new grants.
    Stuck,
}

impl State {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Flannel,
        Self::Preparing,
        Self::Prepared,
        Self::Switching,
        Self::Verifying,
        Self::Calico,
        Self::Reverting,
        Self::Stuck,
    ];

    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flannel => "flannel",
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Switching => "switching",
            Self::Verifying => "verifying",
            Self::Calico => "calico",
            Self::Reverting => "reverting",
            Self::Stuck => "stuck",
        }
    }

    /// Whether the node's network is whole and nobody is about to change it.
    #[must_use]
    pub const fn at_rest(self) -> bool {
        matches!(self, Self::Flannel | Self::Calico)
    }

    /// Whether nothing on the host has been changed yet, so that the lease may still be withdrawn.
    #[must_use]
    pub const fn unchanged(self) -> bool {
        matches!(self, Self::Flannel | Self::Preparing | Self::Prepared)
    }

    /// Whether an agent may report `next` right after `self`. The same state again (another step) is allowed.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        use State::{Calico, Flannel, Prepared, Preparing, Reverting, Stuck, Switching, Verifying};
        self == next
            || matches!(
                (self, next),
                (Flannel, Preparing)
                    | (Preparing, Prepared | Flannel)
                    | (Prepared, Switching | Flannel)
                    | (Switching, Verifying | Reverting | Flannel | Stuck)
                    | (Verifying, Calico | Reverting | Stuck)
                    | (Calico, Reverting)
                    | (Reverting, Flannel | Stuck)
                    // A person repaired the node; the agent looked again.
                    | (Stuck, Flannel | Calico | Reverting)
            )
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(|| Unknown {
            text: text.to_owned(),
            known: "flannel, preparing, prepared, switching, verifying, calico, reverting, stuck",
        })
    }
}

impl serde::Serialize for State {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for State {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Whose DaemonSet pods the node selectors let run on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Network {
    /// flannel's.
    Flannel,
    /// Nobody's: flannel's pod has left or is leaving, Calico's must not come yet.
    None,
    /// Calico's.
    Calico,
}

impl Network {
    /// The label's value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flannel => "flannel",
            Self::None => "none",
            Self::Calico => "calico",
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Network {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        match text {
            "flannel" => Ok(Self::Flannel),
            "none" => Ok(Self::None),
            "calico" => Ok(Self::Calico),
            _ => Err(Unknown { text: text.to_owned(), known: "flannel, none, calico" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_what_it_writes() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert!("Flannel".parse::<State>().is_err());
        assert!("".parse::<State>().is_err());
    }

    #[test]
    fn every_state_leads_to_rest_and_only_a_fit_node_is_switched() {
        for state in State::ALL {
            let mut reached = vec![state];
            let mut i = 0;
            while i < reached.len() {
                let from = reached[i];
                reached.extend(
                    State::ALL
                        .into_iter()
                        .filter(|to| from.may_become(*to) && !reached.contains(to))
                        .collect::<Vec<_>>(),
                );
                i += 1;
            }
            assert!(reached.iter().any(|state| state.at_rest()), "{state} never rests");
            assert_eq!(
                state.may_become(State::Switching),
                matches!(state, State::Prepared | State::Switching)
            );
        }
    }

    #[test]
    fn no_state_with_a_changed_host_goes_back_to_an_unchanged_one_but_flannel() {
        for from in State::ALL.into_iter().filter(|state| !state.unchanged()) {
            for to in [State::Preparing, State::Prepared] {
                assert!(!from.may_become(to), "{from} -> {to}");
            }
        }
    }
}
