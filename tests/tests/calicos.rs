//! Manifests of other Calicos as data: each is found, nothing wrong is said of it, and its CNI config can be rendered.
//!
//! The version that the test bed runs comes with it; the others are read from the archives in the folder that `PARTS_SOURCES` names.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

#[path = "calicos/server.rs"]
mod server;

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use clap::Parser as _;
use flannel_migration_agent::host::cni;
use flannel_migration_coordinator::{
    args::Cli,
    cluster::{Node, NodeFacts},
    preflight::{Finding, Verdict, examine as judge},
    settings::Settings,
    survey,
};
use flannel_migration_protocol::{Epoch, Goal, Grant, Strategy};
use flannel_migration_tests::parts;
use serde_json::{Value, json};
use server::documents;
use tempfile::TempDir;

const WAITS: &str = "projectcalico.org/node-network-during-migration";

/// One version's manifests.
#[derive(Clone)]
struct Calico {
    /// For messages.
    name: String,
    /// `flannel-migration/calico.yaml`.
    migration: Vec<Value>,
    /// `canal.yaml`.
    canal: Vec<Value>,
    /// Manifests that don't wait for the migration's label, as far as they are there.
    unlabelled: Vec<Vec<Value>>,
    /// Its definitions of the group projectcalico.org, as far as they are there.
    newer: Vec<Value>,
}

/// All that there are, for each test to change as it likes.
fn calicos() -> Vec<Calico> {
    static ALL: LazyLock<Vec<Calico>> = LazyLock::new(read_all);
    ALL.clone()
}

/// The first is the test bed's.
fn read_all() -> Vec<Calico> {
    let stock = |name| documents(&parts::manifests::stock(&parts::stacks::CALICO, name).unwrap());
    let mut all = vec![Calico {
        name: "the test bed's".to_owned(),
        migration: stock("calico.yaml"),
        canal: stock("canal.yaml"),
        unlabelled: vec![stock("calico-vxlan.yaml")],
        newer: Vec::new(),
    }];
    let directory = TempDir::new().unwrap();
    let Some(archives) = parts::manifests::unpack_calicos(directory.path()).unwrap() else {
        say(&format!("manifests of other Calicos were NOT read: {} isn't set", parts::sources::VARIABLE));
        return all;
    };
    for root in archives.iter().flat_map(|archive| directories(archive)) {
        all.extend(version(directory.path(), &root));
    }
    assert!(all.len() > 1, "{}: no archive has manifests of Calico", parts::sources::VARIABLE);
    let names: Vec<&str> = all.iter().map(|calico| calico.name.as_str()).collect();
    say(&format!("read were the manifests of {}", names.join(", ")));
    all
}

/// Also where the output of tests that pass isn't shown.
#[allow(clippy::explicit_write, reason = "what eprintln! writes is held back until a test fails")]
fn say(text: &str) {
    writeln!(std::io::stderr(), "\ncalicos: {text}").unwrap();
}

fn directories(root: &Path) -> Vec<PathBuf> {
    let mut all = vec![root.to_owned()];
    let mut next = 0;
    while let Some(directory) = all.get(next).cloned() {
        next += 1;
        let entries = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
        all.extend(entries.filter(|path| path.is_dir()));
    }
    all.sort();
    all
}

/// What is in a directory, if it is one of manifests: laid out as in Calico's sources, or flat.
fn version(root: &Path, directory: &Path) -> Option<Calico> {
    let read = |name: &str| fs::read_to_string(directory.join(name)).ok().map(|text| documents(&text));
    Some(Calico {
        name: directory.strip_prefix(root).unwrap().display().to_string(),
        migration: read("flannel-migration-calico.yaml").or_else(|| read("flannel-migration/calico.yaml"))?,
        canal: read("canal.yaml")?,
        unlabelled: ["calico-vxlan.yaml", "calico.yaml"].into_iter().filter_map(read).collect(),
        newer: definitions(&directory.join("../api/config/crd")),
    })
}

fn definitions(directory: &Path) -> Vec<Value> {
    let entries = fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path());
    let all = entries.flat_map(|path| documents(&fs::read_to_string(path).unwrap()));
    all.filter(|object| object["spec"]["group"] == "projectcalico.org").collect()
}

fn find<'a>(objects: &'a mut [Value], kind: &str, name: &str) -> &'a mut Value {
    let mut found =
        objects.iter_mut().filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn pod(objects: &mut [Value]) -> &mut Value {
    &mut find(objects, "DaemonSet", "calico-node")["spec"]["template"]["spec"]
}

fn install_cni(objects: &mut [Value]) -> &mut Value {
    let containers = pod(objects)["initContainers"].as_array_mut().unwrap();
    containers.iter_mut().find(|container| container["name"] == "install-cni").unwrap()
}

fn set(container: &mut Value, name: &str, value: &str) {
    container["env"].as_array_mut().unwrap().push(json!({ "name": name, "value": value }));
}

fn template(objects: &mut [Value]) -> &mut Value {
    &mut find(objects, "ConfigMap", "calico-config")["data"]["cni_network_config"]
}

/// A node of flannel's with an agent at rest.
fn node() -> Arc<NodeFacts> {
    let prefix = "flannel.alpha.coreos.com";
    let mac = "8e:74:9a:30:24:01";
    let host = json!({
        "rpFilter": 1, "vxlan": [{ "name": "flannel.1", "vni": 1, "port": 8472, "mac": mac, "mtu": 1450 }],
        "plugins": ["bridge", "flannel", "host-local", "loopback", "portmap"],
        "interfaces": [{ "name": "eth0", "addresses": ["172.16.0.1/24"] }],
    });
    let report =
        json!({ "state": "flannel", "since": "2026-01-02T03:04:05Z", "reason": "Started", "host": host });
    let node: Node = serde_json::from_value(json!({
        "metadata": {
            "name": "n1",
            "labels": { "kubernetes.io/os": "linux", "flannel-migration/state": "flannel" },
            "annotations": {
                format!("{prefix}/backend-type"): "vxlan",
                format!("{prefix}/backend-data"): json!({ "VNI": 1, "VtepMAC": mac }).to_string(),
                format!("{prefix}/public-ip"): "172.16.0.1",
                format!("{prefix}/kube-subnet-manager"): "true",
                "flannel-migration/report": report.to_string(),
            },
        },
        "spec": { "podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"] },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    }))
    .unwrap();
    Arc::new(NodeFacts::from(&node))
}

/// What a run would go by in a cluster with these objects, or what is in its way; and all that is found.
fn examine(objects: &[Value]) -> (Option<Settings>, Vec<Finding>) {
    let mut objects = objects.to_vec();
    objects.push(json!({ "kind": "DaemonSet", "metadata": { "name": "flannel-migration-agent", "namespace": "kube-system" } }));
    let options = Cli::parse_from(["coordinator"]).options;
    let nodes = [node()];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let survey = runtime
        .block_on(async { survey::survey(&server::client(&objects), &options, &nodes, &[]).await.unwrap() });
    match judge(&survey, &options.stated, Strategy::InPlace, &nodes) {
        (Verdict::Ready(settings), findings) => (Some(*settings), findings),
        (_, findings) => (None, findings),
    }
}

fn ready(what: &str, objects: &[Value]) -> Settings {
    let (settings, findings) = examine(objects);
    assert_eq!(findings, [], "{what}");
    settings.unwrap_or_else(|| panic!("{what}: not ready"))
}

fn grant(settings: &Settings) -> Grant {
    Grant {
        epoch: Epoch::FIRST,
        fence: 1,
        goal: Goal::Migrate,
        strategy: Strategy::InPlace,
        budget_seconds: 120,
        keep_seconds: 600,
        flannel: settings.flannel_facts.clone(),
        calico: settings.calico_facts.clone(),
    }
}

/// Calico's CNI config on node n1, as the agent there writes it.
fn rendered(what: &str, settings: &Settings) -> Value {
    let text = cni::render(&grant(settings), "n1").unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(!text.contains("__"), "{what}: {text}");
    serde_json::from_str(&text).unwrap()
}

fn with_flannel(calico: &[Value]) -> Vec<Value> {
    [&server::flannel(), calico].concat()
}

#[test]
fn each_calico_is_found_beside_flannel_and_its_config_is_rendered() {
    for Calico { name, migration, .. } in calicos() {
        let settings = ready(&name, &with_flannel(&migration));
        let found = &settings.calico;
        assert_eq!(found.daemon_set.to_string(), "kube-system/calico-node", "{name}");
        assert_eq!(found.cni_conf_name, "10-calico.conflist", "{name}");
        assert!(found.waits && found.health_port == 9099 && found.mtu_key.is_some(), "{name}");
        assert!(found.images.iter().all(|image| image.contains("/calico/")), "{name}: {:?}", found.images);
        let config = rendered(&name, &settings);
        let plugin = &config["plugins"][0];
        assert_eq!(
            (&plugin["nodename"], &plugin["mtu"], &plugin["kubernetes"]["kubeconfig"]),
            (&json!("n1"), &json!(1450), &json!("/etc/cni/net.d/calico-kubeconfig")),
            "{name}"
        );
        assert_eq!(config["name"], "k8s-pod-network", "{name}");
    }
}

#[test]
fn each_canal_is_known_and_can_be_taken_over() {
    for Calico { name, migration, canal, .. } in calicos() {
        let settings = ready(&name, &[canal, migration].concat());
        assert!(settings.flannel.canal && settings.flannel_facts.canal, "{name}");
        assert_eq!(settings.flannel.config_object(), "ConfigMap kube-system/canal-config", "{name}");
        assert!(settings.ip_masq && settings.flannel.version.is_some(), "{name}");
        rendered(&name, &settings);
    }
}

#[test]
fn images_are_found_wherever_they_come_from() {
    for Calico { name, mut migration, .. } in calicos() {
        let digest = "0123456789abcdef".repeat(4);
        for list in ["initContainers", "containers"] {
            for container in pod(&mut migration)[list].as_array_mut().unwrap() {
                let image = container["image"].as_str().unwrap().split_once('/').unwrap().1.to_owned();
                container["image"] = json!(format!("registry.example:5000/mirror/{image}@sha256:{digest}"));
            }
        }
        let settings = ready(&name, &with_flannel(&migration));
        assert!(settings.calico.images.iter().all(|image| image.ends_with(&digest)), "{name}");
        rendered(&name, &settings);
    }
}

/// Calico's installer knows more placeholders than its manifests use. From 3.32 on they are the group of its definitions and whether a file
/// with the MTU must be there, which a manifest may set by variables of its own.
#[test]
fn what_else_the_installer_fills_in_is_rendered_as_it_does() {
    for Calico { name, mut migration, .. } in calicos() {
        let more = r#""calico_api_group": "__CALICO_API_GROUP__", "require_mtu_file": __REQUIRE_MTU_FILE__,
            "log_level": "__LOG_LEVEL__", "log_file_max_size": __LOG_FILE_MAX_SIZE__, "type": "calico","#;
        let text = template(&mut migration).as_str().unwrap().replace(r#""type": "calico","#, more);
        *template(&mut migration) = json!(text.replace(r#""log_level": "info","#, ""));
        let plugin = |migration: &[Value]| {
            rendered(&name, &ready(&name, &with_flannel(migration)))["plugins"][0].clone()
        };
        let config = plugin(&migration);
        assert_eq!(
            (&config["calico_api_group"], &config["require_mtu_file"]),
            (&json!("crd.projectcalico.org/v1"), &json!(false)),
            "{name}"
        );
        assert_eq!(
            (&config["log_level"], &config["log_file_max_size"]),
            (&json!("info"), &json!(100)),
            "{name}"
        );
        set(install_cni(&mut migration), "CALICO_API_GROUP", "crd.projectcalico.org/v1");
        set(install_cni(&mut migration), "REQUIRE_MTU_FILE", "true");
        set(install_cni(&mut migration), "LOG_LEVEL", "debug");
        let level = json!({ "configMapKeyRef": { "name": "calico-config", "key": "size" } });
        let variable = json!({ "name": "LOG_FILE_MAX_SIZE", "valueFrom": level });
        install_cni(&mut migration)["env"].as_array_mut().unwrap().push(variable);
        find(&mut migration, "ConfigMap", "calico-config")["data"]["size"] = json!("7");
        let config = plugin(&migration);
        assert_eq!(
            (&config["require_mtu_file"], &config["log_level"]),
            (&json!(true), &json!("debug")),
            "{name}"
        );
        assert_eq!(config["log_file_max_size"], 7, "{name}");
    }
}

#[test]
fn a_placeholder_that_nobody_fills_is_told_before_anything_is_changed() {
    for Calico { name, mut migration, .. } in calicos() {
        for unknown in ["__SOMETHING_NEW__", "__IPV6_2__", "__SERVICEACCOUNT_TOKEN__"] {
            let text = template(&mut migration).clone();
            let with =
                text.as_str().unwrap().replace("\"name\":", &format!("\"new\": \"{unknown}\", \"name\":"));
            *template(&mut migration) = json!(with);
            let (settings, findings) = examine(&with_flannel(&migration));
            let reasons: Vec<&str> = findings.iter().map(|finding| finding.reason).collect();
            assert_eq!(reasons, ["CalicoManifestUnusable"], "{name}");
            assert!(settings.is_none() && findings[0].found.contains(unknown), "{name}: {}", findings[0]);
            *template(&mut migration) = text;
        }
    }
}

#[test]
fn a_calico_that_does_not_wait_is_told_so_and_nothing_else() {
    for Calico { name, unlabelled, .. } in calicos() {
        for mut calico in unlabelled {
            let (_, findings) = examine(&with_flannel(&calico));
            let reasons: Vec<&str> = findings.iter().map(|finding| finding.reason).collect();
            assert_eq!(reasons, ["CalicoDoesNotWait"], "{name}: {findings:?}");
            pod(&mut calico)["nodeSelector"][WAITS] = json!("calico");
            rendered(&name, &ready(&name, &with_flannel(&calico)));
        }
    }
}

/// From 3.32 on, Calico takes the group projectcalico.org if it is there and crd.projectcalico.org isn't, or if it is told to.
#[test]
fn a_calico_that_keeps_its_data_in_the_newer_group_is_told_so() {
    let expect = |name: &str, calico: &[Value]| {
        let (settings, findings) = examine(&with_flannel(calico));
        let reasons: Vec<&str> = findings.iter().map(|finding| finding.reason).collect();
        assert_eq!(reasons, ["CalicoDatastoreGroup"], "{name}: {findings:?}");
        assert!(settings.is_none(), "{name}");
        findings[0].clone()
    };
    for Calico { name, mut migration, newer, .. } in calicos() {
        set(&mut pod(&mut migration)["containers"][0], "CALICO_API_GROUP", "projectcalico.org/v3");
        let told = expect(&name, &migration);
        assert!(told.object.starts_with("DaemonSet") && told.remedy.contains("CALICO_API_GROUP"), "{told}");
        pod(&mut migration)["containers"][0]["env"].as_array_mut().unwrap().pop();
        // Its own server of the newer group stands on crd.projectcalico.org.
        ready(&name, &with_flannel(&[migration.as_slice(), &newer].concat()));

        let is_old = |object: &Value| object["spec"]["group"] == "crd.projectcalico.org";
        if newer.is_empty() {
            for object in migration.iter_mut().filter(|object| is_old(object)) {
                object["spec"]["group"] = json!("projectcalico.org");
            }
        } else {
            migration.retain(|object| !is_old(object));
            migration.extend(newer);
        }
        let told = expect(&name, &migration);
        assert!(told.object.starts_with("CustomResourceDefinition"), "{told}");
        // Of every version: no older one is needed.
        assert!(
            told.remedy.contains("flannel-migration/calico.yaml") && told.remedy.contains("3.32"),
            "{told}"
        );
    }
}
