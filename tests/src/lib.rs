//! The test bed as a library: a real cluster in network namespaces, and a prober of its traffic.

pub mod bed;
pub mod bench;
pub mod cache;
pub mod images;
pub mod migration;
pub mod parts;
pub mod probe;
pub mod promtool;
pub mod requirements;
pub mod run;
pub mod say;
pub mod scratch;
pub mod shape;
