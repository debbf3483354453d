//! Manifests, protocol and programs say the same.
#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, reason = "a test ends by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use flannel_migration_coordinator::{args, names};
use flannel_migration_protocol::{KEYS, Kind, Writer};
use serde_json::Value;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

fn documents(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(directory().join(file)).unwrap();
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn all() -> Vec<Value> {
    let kustomization = documents("kustomization.yaml").remove(0);
    let files = kustomization["resources"].as_array().unwrap().clone();
    files.iter().flat_map(|file| documents(file.as_str().unwrap())).collect()
}

fn find(kind: &str, name: &str) -> Value {
    let mut found: Vec<_> = all()
        .into_iter()
        .filter(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .collect();
    assert_eq!(found.len(), 1, "{kind} {name}");
    found.remove(0)
}

fn container(object: &Value) -> Value {
    object["spec"]["template"]["spec"]["containers"][0].clone()
}

fn environment(object: &Value) -> BTreeSet<String> {
    container(object)["env"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_rendered_file_holds_what_the_kustomization_holds() {
    let sorted = |objects: Vec<Value>| -> BTreeSet<String> { objects.iter().map(Value::to_string).collect() };
    let rendered = documents("migration-job.yaml");
    assert_eq!(
        rendered.len(),
        all().len(),
        "render again: kubectl kustomize manifests > manifests/migration-job.yaml"
    );
    assert_eq!(
        sorted(rendered),
        sorted(all()),
        "render again: kubectl kustomize manifests > manifests/migration-job.yaml"
    );
}

#[test]
fn the_admission_policy_allows_agents_exactly_their_keys() {
    let policy = find("ValidatingAdmissionPolicy", names::AGENT);
    for (variable, kind) in [
        ("labelKeys", Kind::Label),
        ("annotationKeys", Kind::Annotation),
        ("conditionTypes", Kind::Condition),
    ] {
        let variables = policy["spec"]["variables"].as_array().unwrap();
        let text =
            variables.iter().find(|entry| entry["name"] == variable).unwrap()["expression"].as_str().unwrap();
        let allowed: Vec<String> = serde_json::from_str(&text.replace('\'', "\"")).unwrap();
        let own: Vec<&str> = KEYS
            .iter()
            .filter(|key| key.writer == Writer::Agent && key.kind == kind)
            .map(|key| key.name)
            .collect();
        assert_eq!(allowed, own, "{variable}");
    }
    let user = format!("system:serviceaccount:kube-system:{}", names::AGENT);
    assert!(policy["spec"]["matchConditions"][0]["expression"].as_str().unwrap().contains(&user));
    find("ServiceAccount", names::AGENT);
    assert_eq!(find("ValidatingAdmissionPolicyBinding", names::AGENT)["spec"]["policyName"], names::AGENT);
}

#[test]
fn names_that_users_know_are_those_of_the_programs() {
    let job = find("Job", names::JOB);
    assert_eq!(job["metadata"]["namespace"], "kube-system");
    assert_eq!(job["spec"]["template"]["metadata"]["labels"][names::APP_LABEL], names::APP);
    assert_eq!(find("DaemonSet", names::AGENT)["metadata"]["namespace"], "kube-system");
    let lease = find("Role", names::APP)["rules"]
        .as_array()
        .unwrap()
        .iter()
        .any(|rule| rule["resourceNames"][0] == names::LEASE);
    assert!(lease, "the leadership's Lease is granted by name");
}

#[test]
fn every_variable_of_the_job_is_one_that_the_coordinator_reads() {
    let known: BTreeSet<String> = args::Cli::command()
        .get_arguments()
        .filter_map(|argument| argument.get_env())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    let set = environment(&find("Job", names::JOB));
    assert_eq!(set.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new());
    for name in [
        "FLANNEL_NETWORK",
        "FLANNEL_DAEMONSET_NAME",
        "FLANNEL_MTU",
        "FLANNEL_IP_MASQ",
        "FLANNEL_SUBNET_LEN",
        "FLANNEL_ANNOTATION_PREFIX",
        "FLANNEL_VNI",
        "FLANNEL_PORT",
        "CALICO_DAEMONSET_NAME",
        "CNI_CONFIG_DIR",
        "STRATEGY",
    ] {
        assert!(set.contains(name), "{name}");
    }
}

#[test]
fn the_job_needs_no_privilege_and_never_the_network_that_it_changes() {
    let job = find("Job", names::JOB);
    let spec = &job["spec"]["template"]["spec"];
    assert_eq!(spec["hostNetwork"], true);
    assert_eq!(spec["securityContext"]["runAsUser"], 65532);
    assert_eq!(spec["tolerations"][0], serde_json::json!({ "operator": "Exists" }));
    let security = &container(&job)["securityContext"];
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["capabilities"]["drop"][0], "ALL");
}

#[test]
fn the_agent_finds_the_hosts_paths_where_they_are_on_the_host() {
    let agent = find("DaemonSet", names::AGENT);
    let spec = &agent["spec"]["template"]["spec"];
    assert_eq!(agent["spec"]["updateStrategy"]["type"], "OnDelete");
    for mount in container(&agent)["volumeMounts"].as_array().unwrap() {
        let volume = spec["volumes"]
            .as_array()
            .unwrap()
            .iter()
            .find(|volume| volume["name"] == mount["name"])
            .unwrap();
        // All but /run, into which the service account's token is mounted.
        let path = volume["hostPath"]["path"].as_str().unwrap();
        let expected = if path == "/run" { "/host/run" } else { path };
        assert_eq!(mount["mountPath"], expected);
    }
}
