//! The test bed as a library: a real cluster in network namespaces, and a prober of its traffic.

pub mod bed;
pub mod bench;
pub mod images;
pub mod matrix;
pub mod migration;
pub mod probe;
pub mod promtool;
pub mod scratch;
pub mod shape;

pub use flannel_migration_parts::{self as parts, cache, debian, programs, requirements, run, say};
