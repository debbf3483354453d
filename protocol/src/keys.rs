//! Every key of the protocol, and who may write it.

/// Prefix of the keys that this project owns.
pub const PREFIX: &str = "flannel-migration/";

/// Label, coordinator: epoch of the lease; absent means that there is none.
pub const LEASE: &str = "flannel-migration/lease";
/// Annotation, coordinator: JSON [`crate::Grant`], in the same patch as [`LEASE`].
pub const GRANT: &str = "flannel-migration/grant";
/// Annotation, coordinator: `true` while the node is cordoned by the coordinator.
pub const CORDONED: &str = "flannel-migration/cordoned";
/// Taint, coordinator: `NoSchedule` while pods that their DaemonSets made can't be adopted, so that they don't come back on flannel's
/// network. A cordon doesn't keep them away: their DaemonSets' controller lets them tolerate it.
pub const CLEARING: &str = "flannel-migration/clearing";
/// Annotation, coordinator: JSON [`crate::Failures`].
pub const FAILURES: &str = "flannel-migration/failures";
/// Label, agent: one [`crate::State`].
pub const STATE: &str = "flannel-migration/state";
/// Annotation, agent: JSON [`crate::Report`], in the same patch as [`STATE`].
pub const REPORT: &str = "flannel-migration/report";
/// Annotation, agent: JSON array of [`crate::Adopted`], in the same patch as the state `verifying`.
pub const ADOPTED: &str = "flannel-migration/adopted";
/// Annotation, agent: JSON array of the addresses that the node itself keeps for a while, in the same patch as the state.
pub const KEPT: &str = "flannel-migration/kept";
/// Annotation, administrator: [`crate::Strategy`] for this node only.
pub const STRATEGY: &str = "flannel-migration/strategy";
/// Label, administrator: with any value, the node is not started.
pub const PAUSE: &str = "flannel-migration/pause";
/// Annotation, administrator: [`crate::Request`] about this node; the same key on the Job is about the whole cluster.
pub const REQUEST: &str = "flannel-migration/request";
/// Node condition, agent: whether the node's network is Calico's, verified with traffic.
pub const CONDITION: &str = "NetworkMigrated";
/// Label, coordinator: one [`crate::Network`]. Calico's manifests and its IPAM garbage collection know this key.
pub const NETWORK: &str = "projectcalico.org/node-network-during-migration";

/// Who may write a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The coordinator, while it holds the leadership.
    Coordinator,
    /// The agent of that node, and of no other.
    Agent,
    /// A person; never one of our programs.
    Administrator,
}

/// What carries a key on the Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `metadata.labels`: short, and selectable.
    Label,
    /// `metadata.annotations`.
    Annotation,
    /// `status.conditions`.
    Condition,
    /// `spec.taints`.
    Taint,
}

/// One row of the table in the crate's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Name of the label or annotation, or type of the condition.
    pub name: &'static str,
    /// What carries it.
    pub kind: Kind,
    /// Its only writer.
    pub writer: Writer,
}

const fn key(name: &'static str, kind: Kind, writer: Writer) -> Key {
    Key { name, kind, writer }
}

/// All keys, in the order of the table in the crate's documentation.
pub const KEYS: [Key; 14] = [
    key(LEASE, Kind::Label, Writer::Coordinator),
    key(GRANT, Kind::Annotation, Writer::Coordinator),
    key(CORDONED, Kind::Annotation, Writer::Coordinator),
    key(CLEARING, Kind::Taint, Writer::Coordinator),
    key(FAILURES, Kind::Annotation, Writer::Coordinator),
    key(STATE, Kind::Label, Writer::Agent),
    key(REPORT, Kind::Annotation, Writer::Agent),
    key(ADOPTED, Kind::Annotation, Writer::Agent),
    key(KEPT, Kind::Annotation, Writer::Agent),
    key(STRATEGY, Kind::Annotation, Writer::Administrator),
    key(PAUSE, Kind::Label, Writer::Administrator),
    key(REQUEST, Kind::Annotation, Writer::Administrator),
    key(CONDITION, Kind::Condition, Writer::Agent),
    key(NETWORK, Kind::Label, Writer::Coordinator),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_specification_and_the_table_in_code_are_equal() {
        let rows: Vec<(String, String, String)> = include_str!("lib.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `"))
            .map(|row| {
                let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned());
                let mut next = || cells.next().unwrap_or_default();
                (next(), next(), next())
            })
            .collect();
        let code: Vec<(String, String, String)> = KEYS
            .iter()
            .map(|key| {
                (
                    key.name.to_owned(),
                    format!("{:?}", key.kind).to_lowercase(),
                    format!("{:?}", key.writer).to_lowercase(),
                )
            })
            .collect();
        assert_eq!(rows, code);
    }

    #[test]
    fn keys_of_ours_carry_our_prefix_and_are_unique() {
        for (i, key) in KEYS.iter().enumerate() {
            let ours = key.kind != Kind::Condition && key.name != NETWORK;
            assert_eq!(key.name.starts_with(PREFIX), ours, "{}", key.name);
            assert!(KEYS[i + 1..].iter().all(|other| other.name != key.name), "{}", key.name);
        }
    }
}
