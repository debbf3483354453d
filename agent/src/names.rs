//! Names that people look for.

/// What log lines are found by on the node, `journalctl -t flannel-migration-agent`, and who reports its events.
pub const IDENTIFIER: &str = "flannel-migration-agent";
