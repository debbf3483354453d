//! What a test bed is made of, and how it gets into the cache: Go programs of pinned versions or of sources that the user
//! has, a Debian base, and this project's own programs.
//!
//! A crate of its own, and small: it is compiled in half a minute on a new machine and then builds all the rest side by
//! side, the test bed itself included.

pub mod build;
pub mod cache;
pub mod debian;
pub mod manifests;
pub mod programs;
pub mod requirements;
pub mod run;
pub mod say;
pub mod sources;
pub mod stacks;
pub mod versions;

pub use build::{Parts, build};
pub use versions::{VersionArgs, Versions};
