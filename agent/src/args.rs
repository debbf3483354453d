//! Arguments and environment.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use flannel_migration_telemetry::log::Format;

use crate::steps::Site;

/// Takes this node from flannel to Calico under its running pods, when the coordinator grants it.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// The node's name.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Directory with CNI configs on the host, until a grant says it.
    #[arg(long, env = "CNI_CONFIG_DIR", default_value = "/etc/cni/net.d")]
    pub cni_config_dir: PathBuf,
    /// Directory of the journal, on the host. Below one that is mounted, so that it can be removed in the end.
    #[arg(long, env = "STATE_DIR", default_value = "/var/lib/cni/flannel-migration")]
    pub state_dir: PathBuf,
    /// Directory of the CNI plugins' state on the host.
    #[arg(long, env = "CNI_STATE_DIR", default_value = "/var/lib/cni")]
    pub cni_state_dir: PathBuf,
    /// flannel's run directory on the host.
    #[arg(long, env = "FLANNEL_RUN_DIR", default_value = "/run/flannel")]
    pub flannel_run_dir: PathBuf,
    /// What to log, as tracing's filter.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    pub log: String,
    /// How to log to standard error.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: Format,
    /// Where /metrics, /livez and /readyz are served, address:port on the node.
    #[arg(long, env = "ADMIN_ADDRESS", default_value = "127.0.0.1:19472")]
    pub admin_address: SocketAddr,
}

impl Args {
    /// Where things are on this host.
    #[must_use]
    pub fn site(&self) -> Site {
        Site {
            node: self.node_name.clone(),
            results: self.cni_state_dir.join("results"),
            cni_state: self.cni_state_dir.clone(),
            flannel_run: self.flannel_run_dir.clone(),
            rename_live: true,
        }
    }
}
