//! The coordinator: owns everything cluster-wide, and grants per-node leases to the agents.
//!
//! Decisions ([`discover`], [`settings`], [`preflight`], [`plan`]) are pure; effects ([`api`], [`calico`]) and wiring are apart.

pub mod ahead;
pub mod api;
pub mod args;
pub mod back;
pub mod calico;
pub mod check;
pub mod cluster;
pub mod control;
pub mod discover;
pub mod drain;
pub mod finish;
pub mod images;
pub mod installer;
pub mod leader;
pub mod metrics;
pub mod names;
pub mod node;
pub mod origin;
pub mod orphans;
pub mod pages;
pub mod patch;
pub mod plan;
pub mod preflight;
pub mod requests;
pub mod restore;
pub mod rights;
pub mod roll;
pub mod run;
pub mod selectors;
pub mod settings;
pub mod stage;
pub mod status;
pub mod survey;
