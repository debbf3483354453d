//! Command line and environment, parsed and validated into typed values. Nothing here talks to the cluster.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use flannel_migration_protocol::Strategy;
use flannel_migration_telemetry::log::Format;

/// Name under which kubectl finds this program as `kubectl flannel-migration`.
pub const PLUGIN: &str = "kubectl-flannel_migration";

/// Migrates a running Kubernetes cluster from flannel to Calico, node by node.
#[derive(Clone, Debug, Parser)]
#[command(name = "coordinator", version)]
pub struct Cli {
    /// What to do; without a subcommand: run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of all subcommands.
    #[command(flatten)]
    pub options: Options,
}

/// The subcommands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Migrates the cluster; this is what the Job runs.
    Run,
    /// Checks whether the cluster can be migrated, changes nothing.
    Preflight {
        /// How to print the findings.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Starts no node; what has begun goes on to its end. Without nodes: the whole cluster, flannel's removal included.
    Pause {
        /// Only these nodes.
        nodes: Vec<String>,
    },
    /// Takes a pause, an abort or a rollback back: the migration goes on.
    Resume {
        /// Only these nodes.
        nodes: Vec<String>,
    },
    /// Brings nodes to rest by the shortest way. Without nodes: all, and the Job is suspended; what is migrated stays so.
    Abort {
        /// Only these nodes.
        nodes: Vec<String>,
    },
    /// Takes nodes back to flannel, without a reboot. Without nodes: all, and the Job is suspended; possible until flannel is removed.
    Rollback {
        /// Only these nodes.
        nodes: Vec<String>,
    },
    /// Shows where the migration is: the phase, each node, what waits for what, and what is in the way.
    Status {
        /// How to print it.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
        /// Goes on until the migration is complete: on a terminal with a progress bar, otherwise a line for each change.
        #[arg(short, long)]
        watch: bool,
    },
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For machines.
    Json,
    /// For machines and people.
    Yaml,
}

/// Options of all subcommands.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// What the administrator says about flannel and Calico.
    #[command(flatten)]
    pub stated: Stated,
    /// How the nodes are taken through.
    #[command(flatten)]
    pub policy: Policy,
    /// The node that this process runs on; it is migrated last.
    #[arg(long, env = "NODE_NAME", value_parser = given, global = true)]
    pub node_name: Option<String>,
    /// Name of this process's pod: who holds the leadership.
    #[arg(long, env = "POD_NAME", value_parser = given, global = true)]
    pub pod_name: Option<String>,
    /// Namespace of the Job, the agents and the leadership.
    #[arg(long, env = "POD_NAMESPACE", default_value = "kube-system", global = true)]
    pub namespace: String,
    /// Which events are logged (tracing's filter syntax).
    #[arg(long, env = "LOG_LEVEL", default_value = "info", global = true)]
    pub log: String,
    /// How they are logged.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = Format::Text, global = true)]
    pub log_format: Format,
    /// Where /metrics, /livez and /readyz are served while the migration runs, address:port.
    #[arg(long, env = "ADMIN_ADDRESS", default_value = "127.0.0.1:19471", global = true)]
    pub admin_address: SocketAddr,
    /// Where the reason of a failure is left for the kubelet; only if it exists.
    #[arg(long, env = "TERMINATION_LOG", default_value = "/dev/termination-log", global = true, hide = true)]
    pub termination_log: PathBuf,
}

/// What the administrator says about flannel and Calico. Each is detected when it isn't said. Kept as text: a value that
/// doesn't parse is reported next to what was detected, like one that contradicts it.
#[derive(Clone, Debug, Default, Args)]
pub struct Stated {
    /// flannel's network, a CIDR.
    #[arg(long, env = "FLANNEL_NETWORK", global = true)]
    pub flannel_network: Option<String>,
    /// flannel's DaemonSet.
    #[arg(long, env = "FLANNEL_DAEMONSET_NAME", global = true)]
    pub flannel_daemonset_name: Option<String>,
    /// The namespace of flannel's DaemonSet.
    #[arg(long, env = "FLANNEL_DAEMONSET_NAMESPACE", global = true)]
    pub flannel_daemonset_namespace: Option<String>,
    /// MTU of flannel's device, in bytes.
    #[arg(long, env = "FLANNEL_MTU", global = true)]
    pub flannel_mtu: Option<String>,
    /// Whether flannel masquerades traffic that leaves the cluster.
    #[arg(long, env = "FLANNEL_IP_MASQ", global = true)]
    pub flannel_ip_masq: Option<String>,
    /// Prefix length of a node's subnet.
    #[arg(long, env = "FLANNEL_SUBNET_LEN", global = true)]
    pub flannel_subnet_len: Option<String>,
    /// Prefix of flannel's annotations on nodes.
    #[arg(long, env = "FLANNEL_ANNOTATION_PREFIX", global = true)]
    pub flannel_annotation_prefix: Option<String>,
    /// flannel's VXLAN network identifier.
    #[arg(long, env = "FLANNEL_VNI", global = true)]
    pub flannel_vni: Option<String>,
    /// flannel's VXLAN port.
    #[arg(long, env = "FLANNEL_PORT", global = true)]
    pub flannel_port: Option<String>,
    /// Calico's DaemonSet.
    #[arg(long, env = "CALICO_DAEMONSET_NAME", global = true)]
    pub calico_daemonset_name: Option<String>,
    /// The namespace of Calico's DaemonSet.
    #[arg(long, env = "CALICO_DAEMONSET_NAMESPACE", global = true)]
    pub calico_daemonset_namespace: Option<String>,
    /// The directory with CNI configs on the nodes.
    #[arg(long, env = "CNI_CONFIG_DIR", global = true)]
    pub cni_config_dir: Option<String>,
}

fn given(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// How the nodes are taken through.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct Policy {
    /// What happens to the pods of a node: in-place or drain. An annotation overrides it for one node.
    #[arg(long, env = "STRATEGY", default_value = "in-place", global = true)]
    pub strategy: Strategy,
    /// How many nodes may be in change or not ready at once: a number, or a per cent of the nodes.
    #[arg(long, env = "MAX_UNAVAILABLE", default_value = "1", global = true)]
    pub max_unavailable: MaxUnavailable,
    /// How long evictions of one node may take before the node is given back, e.g. 90s.
    #[arg(long, env = "DRAIN_TIMEOUT", default_value = "300s", value_parser = duration, global = true)]
    pub drain_timeout: Duration,
    /// With so many nodes failed after they had been changed, no further node is started.
    #[arg(long, env = "MAX_FAILURES", default_value = "1", value_parser = clap::value_parser!(u32).range(1..), global = true)]
    pub max_failures: u32,
    /// How long a node may stay outside a rest state, from its switch on, before its agent reverts it.
    #[arg(long, env = "NODE_BUDGET", default_value = "120s", value_parser = duration, global = true)]
    pub node_budget: Duration,
    /// How long a migrated node keeps its bridge's address for connections of its own to its pods before these are cut.
    #[arg(long, env = "KEEP_CONNECTIONS", default_value = "600s", value_parser = duration, global = true)]
    pub keep_connections: Duration,
    /// How long pulling Calico's images may take on all nodes together.
    #[arg(long, env = "IMAGE_TIMEOUT", default_value = "600s", value_parser = duration, global = true)]
    pub image_timeout: Duration,
    /// How long what is in the way of the start is waited for, before the run fails with all findings.
    #[arg(long, env = "PREFLIGHT_TIMEOUT", default_value = "600s", value_parser = duration, global = true)]
    pub preflight_timeout: Duration,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse::<u64>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => text
            .parse::<jiff::SignedDuration>()
            .map_err(|error| error.to_string())
            .and_then(|signed| Duration::try_from(signed).map_err(|error| error.to_string())),
    }?;
    if parsed.is_zero() { Err("must be longer than nothing".to_owned()) } else { Ok(parsed) }
}

/// How many nodes may be unavailable at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxUnavailable {
    /// So many.
    Nodes(usize),
    /// So many per cent of all nodes, rounded down, but at least one.
    PerCent(usize),
}

impl MaxUnavailable {
    /// The number for a cluster of `total` nodes; at least 1, for 0 would never end.
    #[must_use]
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Nodes(nodes) => nodes,
            Self::PerCent(per_cent) => total.saturating_mul(per_cent) / 100,
        }
        .max(1)
    }
}

impl FromStr for MaxUnavailable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is neither a number from 1 nor a per cent from 1% to 100%");
        let number = |digits: &str| digits.parse::<usize>().ok().filter(|number| *number > 0).ok_or_else(bad);
        match text.strip_suffix('%') {
            Some(digits) => number(digits)
                .and_then(|per_cent| if per_cent <= 100 { Ok(Self::PerCent(per_cent)) } else { Err(bad()) }),
            None => number(text).map(Self::Nodes),
        }
    }
}

impl fmt::Display for MaxUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes(nodes) => write!(f, "{nodes}"),
            Self::PerCent(per_cent) => write!(f, "{per_cent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1", 100, 1)]
    #[case("3", 2, 3)]
    #[case("1%", 10, 1)]
    #[case("25%", 10, 2)]
    #[case("100%", 7, 7)]
    fn max_unavailable_is_a_number_or_a_per_cent_and_never_nothing(
        #[case] text: &str,
        #[case] total: usize,
        #[case] nodes: usize,
    ) {
        let parsed: MaxUnavailable = text.parse().unwrap();
        assert_eq!(parsed.of(total), nodes);
        assert_eq!(parsed.to_string(), text);
    }

    #[rstest]
    fn what_is_no_max_unavailable_is_refused(
        #[values("", "0", "-1", "0%", "101%", "x", "1.5", "%")] text: &str,
    ) {
        assert!(text.parse::<MaxUnavailable>().is_err());
    }

    #[test]
    fn a_policy_that_does_not_parse_is_refused() {
        assert!(Cli::try_parse_from(["coordinator", "--drain-timeout", "0"]).is_err());
        assert!(Cli::try_parse_from(["coordinator", "--max-failures", "0"]).is_err());
    }

    #[test]
    fn durations_are_seconds_or_have_units() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2m 5s"), Ok(Duration::from_secs(125)));
        assert!(duration("soon").is_err());
    }
}
