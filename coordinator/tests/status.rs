//! `status -o json` is what the schema in the repository says.
#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, reason = "a test ends by panicking")]

use std::path::Path;

use clap::Parser as _;
use flannel_migration_coordinator::args::Cli;
use flannel_migration_coordinator::cluster::NodeFacts;
use flannel_migration_coordinator::status::{Noted, Phase, PolicyStatus, Status, compose};
use jiff::Timestamp;
use serde_json::{Value, json};

fn schema() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/status.schema.json");
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn the_schema_in_the_repository_is_that_of_the_code() {
    let code = serde_json::to_value(schemars::schema_for!(Status)).unwrap();
    assert!(schema() == code, "write this to docs/status.schema.json:\n{code:#}");
}

#[test]
fn what_is_composed_is_valid_and_what_is_wrong_is_not() {
    let schema = schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let policy = Cli::try_parse_from(["coordinator"]).unwrap().options.policy;
    let noted = Noted {
        phase: Phase::Roll,
        started: Some(Timestamp::UNIX_EPOCH),
        policy: Some(PolicyStatus::from(&policy)),
        ..Noted::default()
    };
    let node = NodeFacts { name: "n1".into(), ready: true, ..NodeFacts::default() };
    let status = compose(&[node.into()], None, &noted, &policy, Timestamp::UNIX_EPOCH);
    let mut value = serde_json::to_value(status).unwrap();
    assert!(
        validator.is_valid(&value),
        "{:?}",
        validator.iter_errors(&value).map(|e| e.to_string()).collect::<Vec<_>>()
    );
    value["phase"] = json!("sideways");
    assert!(!validator.is_valid(&value));
}
