//! The traffic prober: measures continuously whether the pods of a cluster can be reached, in every way that users
//! reach them, and what became of the pods meanwhile.
//!
//! It is one process (root) on the machine that holds all nodes as network namespaces. One thread with real-time
//! priority sends, reads and keeps accounts (`engine`); its sockets are opened inside the namespaces where their
//! traffic starts. Another thread follows pods through the Kubernetes API, and tells the first where they are; the
//! API server may be away meanwhile. A probe that the prober itself had no time to send is neither sent nor lost:
//! it is told apart, as the prober's own resolution.
//!
//! A pod that is gone goes on being probed where it was, so its absence counts, until another pod fills its place.

mod engine;
pub mod flow;
pub mod ledger;
mod link;
pub mod netns;
pub mod packet;
pub mod pods;
mod prober;
pub mod report;
pub mod schedule;
pub mod site;
mod stream;
mod table;
mod watch;
pub mod workload;

use std::io;
use std::time::Duration;

pub use engine::Endpoint;
pub use flow::{Flow, Kind, Method, Place, Slot};
pub use prober::{Meter, Prober, run_for};
pub use report::Report;
pub use site::{Site, SiteNode};
pub use watch::client;
pub use workload::{Workloads, deploy, deploy_to, remove, remove_from, wait_ready};

/// How to probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Time between two probes of a flow, 2 ms at least.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// With how many other nodes each node is paired.
    pub peers: usize,
    /// Port of the pods' TCP echo.
    pub echo_port: u16,
    /// How long to wait at the start for all pods of flows to be there.
    pub ready_within: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(20),
            timeout: Duration::from_millis(500),
            peers: 2,
            echo_port: 7,
            ready_within: Duration::from_mins(1),
        }
    }
}

/// Why the prober can't work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller may not enter network namespaces.
    #[error("the prober needs root: it opens raw sockets in other network namespaces")]
    NotRoot,
    /// A network namespace of the site is not there.
    #[error("can't use the network namespace {path}")]
    Netns {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// One of the prober's threads can't run, or has ended.
    #[error("the prober's thread failed")]
    Thread(#[source] io::Error),
    /// The kubeconfig can't be used.
    #[error("can't use the kubeconfig")]
    Kubeconfig(#[source] kube::config::KubeconfigError),
    /// The API server refused.
    #[error("can't {what}")]
    Api {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: Box<kube::Error>,
    },
    /// The API server didn't answer in time.
    #[error("can't {what}: no answer in time")]
    Silent {
        /// What was asked of it.
        what: &'static str,
    },
    /// Waiting for an object failed.
    #[error("can't wait for {what}")]
    Wait {
        /// Its name.
        what: String,
        /// Why.
        source: Box<kube::runtime::wait::Error>,
    },
    /// The probed workloads are not all there.
    #[error("the probed workloads are not ready: {0}")]
    NotDeployed(String),
}
