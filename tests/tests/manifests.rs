//! What users apply besides the base, and what they alert by, checked by the programs that read it.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use flannel_migration_tests::{bed::flannel::documents, images, parts, promtool::promtool, run};
use serde_json::{Value, json};

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn kustomized(directory: &str) -> Vec<Value> {
    let kubectl =
        parts::build(&parts::Versions::default()).unwrap().program("kubernetes", "kubectl").unwrap();
    let directory = source().join(directory);
    let text = run::output(&mut run::command(
        kubectl.to_str().unwrap(),
        &["kustomize", directory.to_str().unwrap()],
    ));
    documents(&text.unwrap()).unwrap()
}

/// What an overlay changes of the base: paths within objects, and the values there.
fn changes(directory: &str) -> Vec<String> {
    let (base, changed) = (kustomized("manifests"), kustomized(directory));
    assert_eq!(base.len(), changed.len(), "{directory}");
    let mut found = Vec::new();
    for (old, new) in base.iter().zip(&changed) {
        let name = new["kind"].as_str().unwrap();
        assert_eq!(old["metadata"]["name"], new["metadata"]["name"], "{directory}");
        compare(name, old, new, &mut found);
    }
    found
}

fn compare(path: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                compare(&format!("{path}/{key}"), old.get(key).unwrap_or(&Value::Null), value, found);
            }
            found.extend(
                old.keys().filter(|key| !new.contains_key(*key)).map(|key| format!("{path}/{key} is gone")),
            );
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            // What has a name is known by it, not by its place.
            match (by_name(before), by_name(after)) {
                (Some(before), Some(after)) => compare(path, &before, &after, found),
                _ => {
                    for (place, (before, after)) in before.iter().zip(after).enumerate() {
                        compare(&format!("{path}/{place}"), before, after, found);
                    }
                }
            }
        }
        _ if old != new => found.push(format!("{path} = {new}")),
        _ => {}
    }
}

fn by_name(list: &[Value]) -> Option<Value> {
    let named = list.iter().map(|entry| Some((entry["name"].as_str()?.to_owned(), entry.clone())));
    Some(Value::Object(named.collect::<Option<_>>()?))
}

#[test]
fn each_overlay_changes_what_it_is_for_and_nothing_else() {
    let container = "spec/template/spec/containers";
    let job = format!("Job/{container}/flannel-migration-controller");
    let agent = format!("DaemonSet/{container}/agent");
    let image = |of: &str, name: &str| {
        format!("{of}/image = \"registry.example.org/flannel-migration/{name}:v0.1.0\"")
    };
    let scraped = |of: &str, port: u16| {
        let annotations = json!({ "prometheus.io/port": port.to_string(), "prometheus.io/scrape": "true" });
        format!("{of}/spec/template/metadata/annotations = {annotations}")
    };
    for (overlay, expected) in [
        ("registry", vec![image(&agent, "agent"), image(&job, "coordinator")]),
        ("drain", vec![format!("{job}/env/STRATEGY/value = \"drain\"")]),
        ("max-unavailable", vec![format!("{job}/env/MAX_UNAVAILABLE/value = \"10%\"")]),
        (
            "metrics",
            vec![
                format!("{agent}/env/ADMIN_ADDRESS/value = \"[::]:19472\""),
                scraped("DaemonSet", 19472),
                format!("{job}/env/ADMIN_ADDRESS/value = \"[::]:19471\""),
                scraped("Job", 19471),
            ],
        ),
    ] {
        let mut changes = changes(&format!("overlays/{overlay}"));
        let mut expected = expected;
        changes.sort();
        expected.sort();
        assert_eq!(changes, expected, "{overlay}");
    }
}

#[test]
fn every_overlay_is_checked_and_in_the_manual() {
    let manual = fs::read_to_string(source().join("README.md")).unwrap();
    let this = fs::read_to_string(source().join("tests/tests/manifests.rs")).unwrap();
    for entry in fs::read_dir(source().join("overlays")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(this.contains(&format!("\"{name}\"")), "{name} isn't checked");
        assert!(manual.contains(&format!("overlays/{name}")), "{name} isn't in README.md");
    }
}

fn alerts() -> Vec<Value> {
    let text = fs::read_to_string(source().join("docs/alerts.yaml")).unwrap();
    let rules: Value = serde_saphyr::from_str(&text).unwrap();
    rules["groups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap().clone())
        .collect()
}

#[test]
fn alerts_are_rules_that_prometheus_reads_and_fire_when_they_should() {
    let promtool = promtool().unwrap();
    for (check, file) in [("check", "docs/alerts.yaml"), ("test", "docs/alerts_test.yaml")] {
        let file = source().join(file);
        run::output(&mut run::command(promtool.to_str().unwrap(), &[check, "rules", file.to_str().unwrap()]))
            .unwrap();
    }
    let tests = fs::read_to_string(source().join("docs/alerts_test.yaml")).unwrap();
    for alert in alerts() {
        let anchor = alert["annotations"]["runbook"].as_str().unwrap();
        assert!(tests.contains(anchor), "no test in which {} fires", alert["alert"]);
    }
}

#[test]
fn every_alert_has_a_section_of_the_runbook_and_every_section_an_alert() {
    let runbook = fs::read_to_string(source().join("docs/runbook.md")).unwrap();
    let sections: Vec<&str> = runbook.lines().filter_map(|line| line.strip_prefix("## Flannel")).collect();
    let alerts = alerts();
    let names: Vec<String> = alerts.iter().map(|alert| alert["alert"].as_str().unwrap().to_owned()).collect();
    let sections: Vec<String> = sections.iter().map(|rest| format!("Flannel{rest}")).collect();
    assert_eq!(names, sections);
    for alert in &alerts {
        let anchor = format!("docs/runbook.md#{}", alert["alert"].as_str().unwrap().to_lowercase());
        assert_eq!(alert["annotations"]["runbook"], anchor.as_str());
    }
}

#[test]
fn images_are_small() {
    let images = images::build(&parts::build(&parts::Versions::default()).unwrap()).unwrap();
    let product = images::product(&images.base).unwrap();
    let compressed = |file: &Path| -> f64 {
        let script = "gzip -c \"$0\" | wc -c";
        let bytes = run::output(&mut run::command("sh", &["-c", script, file.to_str().unwrap()])).unwrap();
        bytes.trim().parse::<f64>().unwrap() / 1e6
    };
    let coordinator = compressed(&product.coordinator);
    // The rest of the agent's image is Debian's, with iptables and nftables.
    let agent = compressed(&product.agent.parent().unwrap().join("bin/agent"));
    eprintln!("compressed: the coordinator's image {coordinator:.1} MB; the agent's program {agent:.1} MB");
    assert!(coordinator < 15.0 && agent < 15.0, "{coordinator:.1} MB, {agent:.1} MB");
}
