//! What must hold before, and during, a migration. Pure rules over what was read.

mod address;
pub mod calico;
pub mod drain;
mod finding;
pub mod flannel;
pub mod nodes;
mod quantity;
mod rules;
pub mod server;

pub use finding::{Finding, Severity};
pub use rules::{AGENTS_MISSING, Verdict, examine};

#[cfg(test)]
#[path = "values_tests.rs"]
mod values;
