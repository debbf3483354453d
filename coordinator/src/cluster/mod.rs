//! The cluster as it is watched: nodes as plain data for decisions, and a wake-up whenever one changes.

mod facts;
mod follow;
mod nodes;
mod swap;
mod watched;

pub use facts::{Node, NodeFacts};
pub use follow::{Changed, Following};
pub use nodes::{Nodes, Snapshot};
pub(crate) use watched::pauses;
pub use watched::{WATCH_SECONDS, Watched};
