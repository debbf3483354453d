//! The dashboard shows what the programs export, in expressions that Prometheus reads.

#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, reason = "all of it is tests")]

use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path, time::Duration};

use flannel_migration_agent::{journal::Journal, metrics as agent};
use flannel_migration_coordinator::{
    metrics as coordinator,
    status::{AlarmStatus, FindingStatus, NodeStatus, Status},
};
use flannel_migration_protocol::State;
use flannel_migration_telemetry::CountCalls;
use flannel_migration_tests::{promtool::promtool, run};
use prometheus_client::{encoding::text::encode, registry::Registry};
use regex::Regex;
use serde_json::Value;
use tower::{Layer as _, ServiceExt as _};

fn panels() -> Vec<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/dashboard.json");
    let board: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    board["panels"].as_array().unwrap().clone()
}

fn expressions() -> Vec<String> {
    let panels = panels();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect()
}

/// A call to the API server that is counted.
fn call(calls: &CountCalls) {
    let server = tower::service_fn(|_: http::Request<()>| async { Ok::<_, ()>(http::Response::new(())) });
    let answer = calls.layer(server).oneshot(http::Request::get("/").body(()).unwrap());
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(answer).unwrap();
}

/// An agent that has seen everything once; what was never seen isn't exported.
fn agents() -> Registry {
    let mut registry = Registry::with_prefix(agent::PREFIX);
    let metrics = agent::Metrics::registered(&mut registry);
    let directory = tempfile::tempdir().unwrap();
    let mut entry = Journal::open(directory.path(), "n1").unwrap().entry;
    for state in [State::Switching, State::Reverting] {
        entry.state = state;
        metrics.see(&entry);
    }
    call(&metrics.calls);
    registry
}

/// A coordinator that has seen everything once.
fn coordinators() -> Registry {
    let mut registry = Registry::with_prefix(coordinator::PREFIX);
    let metrics = coordinator::Metrics::registered(&mut registry);
    let now = Some(jiff::Timestamp::now());
    let node = NodeStatus { node: "n1".into(), lease: Some(1), leased_at: now, ..NodeStatus::default() };
    let text = String::new;
    let alarm = AlarmStatus { node: text(), reason: "NodeStuck".into(), message: text() };
    let finding = FindingStatus {
        severity: "fatal".into(),
        reason: "FlannelNotFound".into(),
        object: text(),
        found: text(),
        remedy: text(),
    };
    let status =
        Status { nodes: vec![node], alarms: vec![alarm], findings: vec![finding], ..Status::default() };
    metrics.see(&status, true);
    metrics.node_done(Some(Duration::from_secs(1)), 1);
    metrics.node_failed("RpFilterNotStrict");
    metrics.step_ended("grant", Duration::from_secs(1), Some("ApiCallFailed"));
    call(&metrics.calls);
    registry
}

/// Names of all series that a registry's text announces.
fn exported(registry: &Registry) -> BTreeSet<String> {
    let mut text = String::new();
    encode(&mut text, registry).unwrap();
    let mut names = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let endings: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        names.extend(endings.iter().map(|ending| format!("{name}{ending}")));
    }
    names
}

#[test]
fn the_dashboard_shows_what_the_programs_export_and_all_of_it() {
    let exported = &exported(&agents()) | &exported(&coordinators());
    let name = Regex::new(r"\bflannel_migration_\w+").unwrap();
    let expressions = expressions();
    let shown: BTreeSet<String> = expressions
        .iter()
        .flat_map(|expression| name.find_iter(expression).map(|found| found.as_str().to_owned()))
        .collect();
    let unknown: Vec<&String> = shown.difference(&exported).collect();
    assert!(unknown.is_empty(), "nothing exports {unknown:?}");
    // Of a histogram one series is enough; versions, the last lease's number and the time it is in its state are no curves.
    let hidden: Vec<&String> = exported
        .difference(&shown)
        .filter(|name| !name.ends_with("_sum") && !name.ends_with("_count"))
        .filter(|name| {
            !["_build_info", "_agent_epoch", "_state_entered_timestamp_seconds"]
                .iter()
                .any(|end| name.ends_with(end))
        })
        .collect();
    assert!(hidden.is_empty(), "not on the dashboard: {hidden:?}");
}

#[test]
fn every_expression_of_the_dashboard_is_one_that_prometheus_reads() {
    let mut rules = "groups:\n- name: dashboard\n  rules:\n".to_owned();
    for (number, expression) in expressions().iter().enumerate() {
        writeln!(rules, "  - record: dashboard:{number}\n    expr: {}", Value::from(expression.as_str()))
            .unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let check = |text: &str| {
        let file = directory.path().join("rules.yaml");
        fs::write(&file, text).unwrap();
        let promtool = promtool().unwrap();
        run::output(&mut run::command(
            promtool.to_str().unwrap(),
            &["check", "rules", file.to_str().unwrap()],
        ))
    };
    check(&rules).unwrap();
    assert!(check(&rules.replacen("max by", "max max by", 1)).is_err(), "nothing is checked");
}

#[test]
fn every_panel_has_its_place_and_says_what_it_shows() {
    let mut taken = BTreeSet::new();
    for panel in panels() {
        let (place, title) = (&panel["gridPos"], panel["title"].as_str().unwrap());
        let of = |key: &str| place[key].as_u64().unwrap();
        assert!(of("x") + of("w") <= 24, "{title}");
        for x in of("x")..of("x") + of("w") {
            for y in of("y")..of("y") + of("h") {
                assert!(taken.insert((x, y)), "{title} covers another panel");
            }
        }
        assert!(panel["description"].as_str().is_some_and(|text| text.ends_with('.')), "{title}");
        assert!(taken.insert((100 + panel["id"].as_u64().unwrap(), 0)), "{title} has another's id");
    }
}
