//! What both programs tell besides the protocol: log lines, metrics, and whether they live and are ready.

pub mod admin;
pub mod build;
pub mod calls;
pub mod log;
pub mod probes;

pub use admin::serve;
pub use calls::CountCalls;
pub use probes::Probes;
