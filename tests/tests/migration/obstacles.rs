//! What is in a node's way: its settings, and budgets that forbid evictions.

use std::time::Duration;

use flannel_migration_tests::{
    bed::Bed,
    migration::{self, Job, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL},
    probe::workload::IMAGE,
    run,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{bed, complete, expect_migrated, items, label, look, screen};

fn condition(node: &Value, kind: &str) -> Value {
    let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.into_iter().find(|condition| condition["type"] == kind).unwrap_or_default()
}

/// A pod that may only be on `node`, and a budget that never lets it go.
fn guarded(node: &str) -> Vec<Value> {
    let labels = json!({ "app": "guarded" });
    vec![
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "guarded", "namespace": "default" },
            "spec": { "replicas": 1, "selector": { "matchLabels": labels }, "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "nodeSelector": { "kubernetes.io/hostname": node },
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{ "name": "echo", "image": IMAGE, "imagePullPolicy": "IfNotPresent" }],
                },
            } },
        }),
        json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "never", "namespace": "default" },
            "spec": { "minAvailable": 1, "selector": { "matchLabels": labels } },
        }),
    ]
}

/// What a migration changes on a host: flannel's device and routes, CNI configs, flannel's rules.
fn host(bed: &Bed, node: &str) -> String {
    // Not the bridge: pods that left other nodes may come in between, and then it does.
    let look = "ip -o link show flannel.1 | cut -d: -f2; ip route show dev flannel.1; \
                ls /etc/cni/net.d/*.conf* /run/flannel; cat /etc/cni/net.d/*.conf*; \
                iptables-save | grep -i flannel | sort";
    bed.exec(node, &["sh", "-c", look]).unwrap()
}

fn expect_untouched(bed: &Bed, name: &str, filter: &str) {
    let node = look(bed, name);
    let condition = condition(&node, "NetworkMigrated");
    assert_eq!(condition["status"], "False", "{name}: {condition}");
    assert_eq!(condition["reason"], "RpFilterNotStrict", "{name}: {condition}");
    let message = condition["message"].as_str().unwrap();
    assert!(message.contains("sysctl -w net.ipv4.conf.all.rp_filter=1"), "{name}: {message}");
    assert!(message.contains(&format!("is {filter}")), "{name}: {message}");
    assert_eq!(label(&node, NETWORK_LABEL), "flannel", "{name}");
    assert_ne!(node["spec"]["unschedulable"], json!(true), "{name} is cordoned");
}

#[test]
fn nodes_with_an_obstacle_are_left_as_they_were_while_others_go_on_and_are_tried_again() {
    let mut nodes = NodeShape::numbered(4);
    nodes[1].rp_filter = 2;
    nodes[3].rp_filter = 0;
    let scratch = bed("m-obstacles", Shape { nodes, ..Shape::default() });
    let bed = &scratch.bed;
    bed.apply(&guarded("n3")).unwrap();
    bed.kubectl(&["rollout", "status", "deployment/guarded", "--timeout=60s"]).unwrap();
    let pod = items(&bed.get(&["pods", "-l", "app=guarded"]).unwrap()).remove(0);
    let (pod, uid) = (pod["metadata"]["name"].as_str().unwrap().to_owned(), pod["metadata"]["uid"].clone());

    screen::start_journald(bed, "n1");
    let hosts = ["n2", "n4"].map(|node| host(bed, node));
    assert!(hosts[0].contains("flannel.1") && hosts[0].contains("10-flannel.conflist"), "{}", hosts[0]);
    migration::apply(bed, &[("STRATEGY", "drain"), ("DRAIN_TIMEOUT", "4s")]).unwrap();
    let failures =
        |node: &str| look(bed, node)["metadata"]["annotations"]["flannel-migration/failures"].clone();
    run::wait_for("n1 is migrated and the others are given back", Duration::from_mins(2), || {
        let n1 = look(bed, "n1");
        let done = label(&n1, STATE_LABEL) == "calico" && label(&n1, LEASE_LABEL).is_empty();
        let resting =
            |node: &str| failures(node).is_string() && label(&look(bed, node), LEASE_LABEL).is_empty();
        Ok(done && ["n2", "n3", "n4"].iter().all(|node| resting(node)))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap_or_default()));
    assert_eq!(migration::job(bed).unwrap(), Job::Running);
    // Mostly its first lease: controllers that are slow to place the evicted pods can cost it one.
    let epoch = epoch(bed, "n1");
    expect_untouched(bed, "n2", "2");
    expect_untouched(bed, "n4", "0");
    assert_eq!(hosts, ["n2", "n4"].map(|node| host(bed, node)));

    let n3 = look(bed, "n3");
    assert_ne!(n3["spec"]["unschedulable"], json!(true), "{}", n3["spec"]);
    assert_eq!(label(&n3, NETWORK_LABEL), "flannel");
    let noted = failures("n3").as_str().unwrap().to_owned();
    let events = bed.get(&["events", "--field-selector=involvedObject.name=n3,reason=DrainBlocked"]).unwrap();
    let told = items(&events).iter().map(|event| event["message"].to_string()).collect::<String>();
    for (what, text) in [("the annotation", &noted), ("the event", &told)] {
        for word in [&pod, "never", "within 4 s"] {
            assert!(text.contains(word), "{what} doesn't name {word:?}: {text}");
        }
    }
    screen::expect_status(bed, "n1", "n2");
    screen::expect_metrics(bed, "n1", epoch);
    let memory = screen::agent_memory(bed, "n1");
    eprintln!("m-obstacles: the agent at rest takes {memory:.1} MiB");
    assert!(memory < 15.0, "{memory:.1} MiB");
    screen::expect_events(bed, "n1", epoch);
    screen::expect_journal(bed, "n1");
    let same = bed.get(&["pod", &pod]).unwrap();
    assert_eq!(same["metadata"]["uid"], uid, "the guarded pod was replaced");

    bed.exec("n2", &["sysctl", "-w", "net.ipv4.conf.all.rp_filter=1"]).unwrap();
    bed.exec("n4", &["sysctl", "-w", "net.ipv4.conf.all.rp_filter=1"]).unwrap();
    bed.kubectl(&["delete", "poddisruptionbudget", "never"]).unwrap();
    let took = complete(bed, Duration::from_mins(3));
    eprintln!("m-obstacles: 1/1 {:.1} s after the obstacles went", took.as_secs_f32());
    expect_migrated(bed);
    expect_story(bed, "n1", epoch);
    screen::expect_end(bed);
}

/// The lease that a node's agent last reported about.
fn epoch(bed: &Bed, node: &str) -> u32 {
    let report = look(bed, node)["metadata"]["annotations"]["flannel-migration/report"].clone();
    let report: Value = serde_json::from_str(report.as_str().unwrap()).unwrap();
    u32::try_from(report["epoch"].as_u64().unwrap_or_else(|| panic!("no epoch in {report}"))).unwrap()
}

/// Both logs tell how one node was taken through under one lease, by fields.
fn expect_story(bed: &Bed, node: &str, epoch: u32) {
    let under = format!("epoch={epoch}");
    let of_node = format!("node=\"{node}\"");
    let coordinator: Vec<String> = migration::coordinator_log(bed)
        .unwrap()
        .lines()
        .filter(|line| line.contains(&of_node))
        .map(str::to_owned)
        .collect();
    let agent: Vec<String> = migration::agent_log(bed, node).unwrap().lines().map(str::to_owned).collect();
    let story = format!("{}\n---\n{}", coordinator.join("\n"), agent.join("\n"));
    assert!(coordinator.len() + agent.len() < 40, "{} lines:\n{story}", coordinator.len() + agent.len());
    for (whose, lines) in [("coordinator", &coordinator), ("agent", &agent)] {
        let told: Vec<&String> = lines.iter().filter(|line| line.contains(&under)).collect();
        assert!(told.len() >= 4, "{whose}:\n{story}");
        for line in told {
            let missing = ["node=", "state=", "step="].into_iter().find(|field| !line.contains(field));
            assert_eq!(missing, None, "{whose}: {line}\n{story}");
        }
    }
    eprintln!("{} + {} lines about {node}:\n{story}", coordinator.len(), agent.len());
}
