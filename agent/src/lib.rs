//! The agent takes one node from flannel to Calico under its running pods, or back.
//!
//! What it and the coordinator say to each other is specified in [`flannel_migration_protocol`].

pub mod agent;
pub mod alone;
pub mod args;
pub mod calicos;
pub mod decide;
pub mod echo;
pub mod guests;
pub mod host;
pub mod inventory;
pub mod journal;
pub mod metrics;
pub mod names;
pub mod news;
pub mod node;
pub mod observe;
pub mod policies;
pub mod probe;
pub mod steps;
pub mod work;
