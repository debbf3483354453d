//! What the migration promises beside the happy path, on real clusters: settings that are wrong, nodes and budgets that are in the way,
//! coordinators that go, and rights that are needed.
//!
//! Every test here needs root and brings a real cluster up; run them one after another (`hack/test` does).

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

#[path = "migration/authority.rs"]
mod authority;
#[path = "migration/faults.rs"]
mod faults;
#[path = "migration/files.rs"]
mod files;
#[path = "migration/in_place.rs"]
mod in_place;
#[path = "migration/kills.rs"]
mod kills;
#[path = "migration/matrix.rs"]
mod matrix;
#[path = "migration/obstacles.rs"]
mod obstacles;
#[path = "migration/orphans.rs"]
mod orphans;
#[path = "migration/outages.rs"]
mod outages;
#[path = "migration/partition.rs"]
mod partition;
#[path = "migration/reboots.rs"]
mod reboots;
#[path = "migration/rights.rs"]
mod rights;
#[path = "migration/rollback.rs"]
mod rollback;
#[path = "migration/screen.rs"]
mod screen;
#[path = "migration/settings.rs"]
mod settings;
#[path = "migration/spoiled.rs"]
mod spoiled;
#[path = "migration/table.rs"]
mod table;
#[path = "migration/unusual.rs"]
mod unusual;
#[path = "migration/witness.rs"]
mod witness;
#[path = "migration/writes.rs"]
mod writes;

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use flannel_migration_tests::{
    bed::Bed,
    bench::history::Follower,
    migration::{self, Job, LEASE_LABEL, STATE_LABEL, checks},
    probe::{Workloads, deploy_to},
    run,
    scratch::Scratch,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");
const CONTROLLER: &str = "flannel-migration-controller";
const AGENT: &str = "flannel-migration-agent";

fn bed(name: &str, shape: Shape) -> Scratch {
    let scratch = Scratch::up(name, shape, TESTBED).unwrap();
    scratch.bed.load_project_images().unwrap();
    scratch.bed.apply_calico().unwrap();
    scratch
}

fn items(list: &Value) -> Vec<Value> {
    list["items"].as_array().cloned().unwrap_or_default()
}

fn label(node: &Value, key: &str) -> String {
    node["metadata"]["labels"][key].as_str().unwrap_or_default().to_owned()
}

fn look(bed: &Bed, node: &str) -> Value {
    bed.get(&["node", node]).unwrap()
}

/// Waits until the Job is 1/1; returns how long that took.
fn complete(bed: &Bed, limit: Duration) -> Duration {
    let started = Instant::now();
    let waited = run::wait_for("the Job completes", limit, || match migration::job(bed)? {
        Job::Failed(why) => {
            panic!("the Job failed: {why}\n{}", migration::coordinator_log(bed).unwrap_or_default())
        }
        job => Ok(job == Job::Complete),
    });
    if let Err(error) = waited {
        panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap_or_default());
    }
    started.elapsed()
}

fn expect_migrated(bed: &Bed) {
    run::wait_for("pods are Ready", Duration::from_secs(30), || Ok(checks::pods(bed)?.is_empty())).ok();
    for found in [
        checks::nodes(bed, &[]).unwrap(),
        checks::pods(bed).unwrap(),
        checks::ipam(bed).unwrap(),
        checks::leftovers(bed).unwrap(),
        checks::objects(bed).unwrap(),
    ] {
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
}

/// Everything that a migration writes first, without what kubelets write all the time.
fn picture(bed: &Bed) -> BTreeMap<String, Value> {
    let mut picture = BTreeMap::new();
    for node in items(&bed.get(&["nodes"]).unwrap()) {
        let name = node["metadata"]["name"].as_str().unwrap().to_owned();
        let mut conditions = node["status"]["conditions"].clone();
        for condition in conditions.as_array_mut().unwrap() {
            condition.as_object_mut().unwrap().remove("lastHeartbeatTime");
        }
        let seen =
            json!([node["metadata"]["labels"], node["metadata"]["annotations"], node["spec"], conditions]);
        picture.insert(format!("node {name}"), seen);
    }
    for kind in ["ippools", "felixconfigurations", "blockaffinities", "ipamblocks", "ipamhandles"] {
        let kind = format!("{kind}.crd.projectcalico.org");
        for object in items(&bed.get(&[&kind]).unwrap()) {
            let name = object["metadata"]["name"].as_str().unwrap();
            picture.insert(format!("{kind} {name}"), object["metadata"]["resourceVersion"].clone());
        }
    }
    for set in items(&bed.get(&["daemonsets", "--all-namespaces"]).unwrap()) {
        let name = set["metadata"]["name"].as_str().unwrap();
        if name != AGENT {
            let seen = json!([
                set["metadata"]["generation"],
                set["metadata"]["annotations"],
                set["metadata"]["uid"]
            ]);
            picture.insert(format!("daemonset {name}"), seen);
        }
    }
    let config = bed.get(&["-n", "kube-system", "configmap", "calico-config"]).unwrap();
    picture.insert("configmap calico-config".to_owned(), config["metadata"]["resourceVersion"].clone());
    picture
}

fn expect_same(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>) {
    for key in before.keys().chain(after.keys()) {
        assert_eq!(before.get(key), after.get(key), "{key} changed");
    }
}

/// The coordinator's pod that runs now.
fn coordinator_pod(bed: &Bed) -> String {
    let mut name = String::new();
    run::wait_for("a coordinator runs", Duration::from_mins(2), || {
        let pods = items(&bed.get(&["-n", "kube-system", "pods", "-l", &format!("k8s-app={CONTROLLER}")])?);
        let running = pods.iter().find(|pod| {
            pod["metadata"]["deletionTimestamp"].is_null()
                && pod["status"]["containerStatuses"][0]["state"]["running"].is_object()
        });
        name = running.map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned()).unwrap_or_default();
        Ok(!name.is_empty())
    })
    .unwrap();
    name
}

fn delete_coordinator(bed: &Bed) {
    bed.kubectl(&["-n", "kube-system", "delete", "pod", "--wait=false", &coordinator_pod(bed)]).unwrap();
}

fn evict_coordinator(bed: &Bed) {
    let pod = coordinator_pod(bed);
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": pod, "namespace": "kube-system" },
    });
    let path = format!("/api/v1/namespaces/kube-system/pods/{pod}/eviction");
    let mut command = bed.kubectl_command(&["create", "--raw", &path, "-f", "-"]).unwrap();
    run::output_with_input(&mut command, eviction.to_string().as_bytes()).unwrap();
}

/// Ends the coordinator's process as a crash would, on `node` where it runs.
fn kill_coordinator(bed: &Bed, node: &str) {
    coordinator_pod(bed);
    let inside = run::output(&mut run::command("ip", &["netns", "pids", &bed.plan.netns(node)])).unwrap();
    let is_coordinator = |pid: &&str| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "coordinator"
    };
    let pids: Vec<&str> = inside.lines().filter(is_coordinator).collect();
    assert!(!pids.is_empty(), "no coordinator's process on {node}");
    for pid in pids {
        run::output(&mut run::command("kill", &["-KILL", pid])).unwrap();
    }
}

/// Waits until `node` holds a lease and is in one of these states.
fn moment(bed: &Bed, node: &str, states: &[&str]) {
    let what = format!("{node} is leased and one of {}", states.join(", "));
    run::wait_for(&what, Duration::from_mins(2), || {
        assert_ne!(migration::job(bed)?, Job::Complete, "{what}: missed");
        let now = look(bed, node);
        Ok(!label(&now, LEASE_LABEL).is_empty() && states.contains(&label(&now, STATE_LABEL).as_str()))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap_or_default()));
}

#[test]
fn a_run_outlives_its_coordinators_needs_every_right_it_has_and_changes_nothing_the_second_time() {
    let scratch = bed("m-interrupt", Shape { nodes: NodeShape::numbered(2), ..Shape::default() });
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let follower = Follower::start(&bed.plan.kubeconfig(), Instant::now()).unwrap();
    // On a known node, so that it is certain to be on the node that is migrated: its own is the last one.
    migration::apply_with(bed, &[("STRATEGY", "drain")], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n2");
    })
    .unwrap();
    let began = Instant::now();
    // The Job's controller waits 10, 20, 40 s before it replaces a pod; a process that died starts again at once.
    let early = ["flannel", "preparing", "prepared"];
    moment(bed, "n1", &early);
    kill_coordinator(bed, "n2");
    moment(bed, "n1", &["switching", "verifying"]);
    delete_coordinator(bed);
    moment(bed, "n2", &early);
    evict_coordinator(bed);
    moment(bed, "n2", &["prepared", "switching", "verifying"]);
    kill_coordinator(bed, "n2");
    moment(bed, "n2", &["verifying", "calico"]);
    delete_coordinator(bed);
    complete(bed, Duration::from_mins(3));
    eprintln!("m-interrupt: 1/1 after {:.1} s with 5 interruptions", began.elapsed().as_secs_f32());
    expect_migrated(bed);
    for (node, moments) in follower.finish() {
        let reopened = moments.iter().any(|now| now.leased && now.state == "calico" && !now.cordoned);
        assert!(reopened, "{node} takes no pods before its left-over pods are made anew: {moments:#?}");
        let closed = moments.iter().filter(|now| now.network == "none").all(|now| now.cordoned);
        assert!(closed, "{node} isn't cordoned while it has no network: {moments:#?}");
    }
    let policies = checks::policies(bed).unwrap();
    assert!(policies.is_empty(), "{}", policies.join("\n"));

    migration::delete(bed).unwrap();
    // Only now: a watch is in the audit log when it has ended.
    rights::expect_rights_used(bed);
    let before = picture(bed);
    migration::apply(bed, &[]).unwrap();
    let took = complete(bed, Duration::from_mins(1));
    eprintln!("m-interrupt: the second run took {:.1} s", took.as_secs_f32());
    // Whatever agents that have just started would write, they have written.
    let agents = format!("k8s-app={AGENT}");
    bed.kubectl(&[
        "-n",
        "kube-system",
        "wait",
        "--for=condition=Ready",
        "pods",
        "-l",
        &agents,
        "--timeout=60s",
    ])
    .unwrap();
    std::thread::sleep(Duration::from_secs(6));
    expect_same(&before, &picture(bed));
    expect_migrated(bed);
}
