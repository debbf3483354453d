//! Pods that aren't as most are, on one node: what is taken over, what must leave, and what holds the node up.

use std::{collections::BTreeMap, fs, time::Duration};

use flannel_migration_tests::{
    bed::{Bed, node},
    migration::{self, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL, pods},
    probe::workload::IMAGE,
    run,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{bed, complete, expect_migrated, items, label, look};

const NODE: &str = "n1";
const HOST_PORT: u16 = 18080;

fn pod(name: &str, mut spec: Value) -> Value {
    let defaults = json!({ "image": IMAGE, "imagePullPolicy": "IfNotPresent" });
    for (list, name) in [("containers", "main"), ("initContainers", "init")] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            container["name"] = json!(name);
            for (key, value) in defaults.as_object().unwrap() {
                container[key] = value.clone();
            }
        }
    }
    spec["terminationGracePeriodSeconds"] = json!(1);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "default", "labels": { "app": name } }, "spec": spec,
    })
}

/// Ends at once, without success: its port isn't one.
fn failing() -> Value {
    json!([{ "env": [{ "name": "ECHO_PORT", "value": "none" }] }])
}

fn unusual_pods(bed: &Bed) {
    let daemon = pod("daemon", json!({ "containers": [{}] }));
    bed.apply(&[
        pod("host-port", json!({ "containers": [{ "ports": [{ "containerPort": 8080, "hostPort": HOST_PORT }] }] })),
        pod("in-init", json!({ "initContainers": [{}], "containers": [{}] })),
        pod("crash-looping", json!({ "containers": failing() })),
        pod("ended", json!({ "restartPolicy": "Never", "containers": failing() })),
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "daemon", "namespace": "default" },
            "spec": {
                "selector": { "matchLabels": { "app": "daemon" } },
                "template": { "metadata": daemon["metadata"], "spec": daemon["spec"] },
            },
        }),
    ])
    .unwrap();
    let directory = node::stable_root(bed, NODE).join("etc/kubernetes/manifests");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("fixed.json"), pod("fixed", json!({ "containers": [{}] })).to_string()).unwrap();
}

fn all(bed: &Bed) -> BTreeMap<String, Value> {
    let pods = items(&bed.get(&["pods", "-n", "default"]).unwrap());
    let name = |pod: &Value| pod["metadata"]["labels"]["app"].as_str().unwrap_or_default().to_owned();
    pods.into_iter().map(|pod| (name(&pod), pod)).collect()
}

/// Runs a command in the network namespace of a pod.
fn inside(bed: &Bed, pod: &Value, command: &str) {
    let address = pod["status"]["podIP"].as_str().unwrap();
    let find = format!(
        "for n in /run/netns/*; do nsenter --net=$n ip -o address | grep -q ' {address}/' && exec nsenter --net=$n {command}; done; exit 1"
    );
    bed.exec(NODE, &["sh", "-c", &find]).unwrap();
}

fn answers(bed: &Bed, address: &str, port: u16) {
    let ask = format!("echo | timeout 5 busybox nc {address} {port} | grep -q '200 OK'");
    bed.exec(NODE, &["sh", "-c", &ask]).unwrap_or_else(|error| panic!("{address}:{port}: {error:#}"));
}

#[test]
fn unusual_pods_are_taken_over_or_leave_and_a_static_pod_that_cannot_holds_its_node_up() {
    let scratch = bed("m-unusual", Shape { nodes: NodeShape::numbered(1), ..Shape::default() });
    let bed = &scratch.bed;
    unusual_pods(bed);
    let waiting = |pod: &Value, pointer: &str| pod.pointer(pointer).cloned().unwrap_or_default();
    run::wait_for("the pods are as they are meant to be", Duration::from_mins(1), || {
        let all = all(bed);
        let is = |name: &str, pointer: &str, value: Value| {
            all.get(name).is_some_and(|pod| waiting(pod, pointer) == value)
        };
        let ready = |name: &str| is(name, "/status/containerStatuses/0/ready", json!(true));
        // Kubelets differ in when they call it CrashLoopBackOff: it was started again, and failed again.
        let crashed = "/status/containerStatuses/0/lastState/terminated/exitCode";
        Ok(["host-port", "daemon", "fixed"].into_iter().all(ready)
            && is("in-init", "/status/initContainerStatuses/0/started", json!(true))
            && is("crash-looping", crashed, json!(1))
            && is("ended", "/status/phase", json!("Failed")))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:#?}", all(bed)));
    let before = all(bed);
    let identities = pods::identities(bed).unwrap();
    let more = "ip link add more up type veth peer name evermore";
    inside(bed, &before["daemon"], more);
    inside(bed, &before["fixed"], more);

    // A static pod that can't be taken over: nothing is changed, and what is to be done is said.
    migration::apply(bed, &[]).unwrap();
    let failures = || look(bed, NODE)["metadata"]["annotations"]["flannel-migration/failures"].clone();
    run::wait_for("the node is given back", Duration::from_mins(1), || Ok(failures().is_string()))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap()));
    let told = failures().as_str().unwrap().to_owned();
    assert!(
        told.contains("StaticPodNotAdoptable") && told.contains("default/fixed-n1 (MoreInterfaces)"),
        "{told}"
    );
    assert!(told.contains(r#""touched":false"#), "{told}");
    let now = look(bed, NODE);
    assert_eq!(
        (label(&now, NETWORK_LABEL).as_str(), label(&now, STATE_LABEL).as_str()),
        ("flannel", "flannel")
    );
    assert!(label(&now, LEASE_LABEL).is_empty() && now["spec"]["unschedulable"].is_null(), "{}", now["spec"]);

    inside(bed, &before["fixed"], "ip link delete more");
    complete(bed, Duration::from_mins(2));
    run::wait_for("the DaemonSet's pod is back", Duration::from_mins(1), || {
        let daemon = all(bed).remove("daemon");
        Ok(daemon.is_some_and(|pod| pod["status"]["containerStatuses"][0]["ready"] == true))
    })
    .unwrap();
    let after = all(bed);
    let uid = |pod: &Value| pod["metadata"]["uid"].clone();
    for (name, pod) in &before {
        assert_eq!(uid(pod) == uid(&after[name]), name != "daemon", "{name}: {:#}", after[name]["status"]);
        if !["daemon", "ended"].contains(&name.as_str()) {
            assert_eq!(pod["status"]["podIP"], after[name]["status"]["podIP"], "{name}");
        }
    }
    let changed = pods::differences(&identities, &pods::identities(bed).unwrap());
    // The one that crashes goes on crashing.
    let expected = |line: &String| {
        ["default/daemon-", "default/crash-looping"].iter().any(|name| line.starts_with(name))
    };
    assert!(changed.iter().all(expected), "{}", changed.join("\n"));
    for name in ["host-port", "daemon", "fixed"] {
        answers(bed, after[name]["status"]["podIP"].as_str().unwrap(), 8080);
    }
    let host = look(bed, NODE)["status"]["addresses"][0]["address"].as_str().unwrap().to_owned();
    answers(bed, &host, HOST_PORT);
    // What was taken over ends as any other: Calico's plugins find everything that they take down.
    bed.kubectl(&["delete", "pod", "host-port", "in-init", "crash-looping", "ended", "--timeout=60s"])
        .unwrap();
    let ports = bed.exec(NODE, &["sh", "-c", "iptables-save -t nat"]).unwrap();
    assert!(!ports.contains(&HOST_PORT.to_string()), "{ports}");
    let links = bed.exec(NODE, &["sh", "-c", "ip -o link | grep -c ': cali' || true"]).unwrap();
    let left = items(&bed.get(&["pods", "-A"]).unwrap());
    let own =
        left.iter().filter(|pod| pod["spec"]["hostNetwork"] != true && pod["status"]["phase"] == "Running");
    assert_eq!(links.trim(), own.count().to_string(), "links of pods that are gone");
    // The crash-looping pod, which isn't ready, is gone by now.
    expect_migrated(bed);
}
