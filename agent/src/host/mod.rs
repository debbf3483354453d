//! The only place that reads or changes the host.

pub mod cni;
pub mod command;
pub mod connections;
pub mod facts;
pub mod files;
pub mod ingress;
pub mod iptables;
pub mod links;
pub mod messages;
pub mod messages6;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod process;
pub mod routes;
pub mod saved;
pub mod sysctl;
pub mod tables;
