//! The test bed itself: shapes, isolation, survival, and that nothing of it stays.
//!
//! Every test here needs root and brings real clusters up; run them one after another (`hack/test` does).

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use flannel_migration_tests::{
    bed::{self, Bed, control, teardown},
    probe::{Kind, Options, Prober, Report, Workloads, deploy_to},
    run,
    scratch::{Machine, Scratch},
    shape::{Layout, NodeShape, Rules, Shape},
};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");

fn two_nodes() -> Shape {
    Shape { nodes: NodeShape::numbered(2), ..Shape::default() }
}

fn measure(prober: &Prober, time: Duration) -> Report {
    prober.reset().unwrap();
    std::thread::sleep(time);
    prober.report().unwrap()
}

/// Waits until nothing was lost for two seconds.
fn settle(prober: &Prober, limit: Duration) {
    let mut last = None;
    run::wait_for("traffic settles", limit, || {
        let report = measure(prober, Duration::from_secs(2));
        let quiet = report.lost() == 0 && report.flows.iter().all(|flow| flow.figures.sent > 0);
        last = Some(report);
        Ok(quiet)
    })
    .unwrap_or_else(|error| panic!("{error}:\n{}", last.map(|report| report.table()).unwrap_or_default()));
}

#[test]
fn a_cluster_carries_traffic_and_survives_a_dead_link_a_reboot_and_an_api_outage() {
    let mut scratch = Scratch::up("t-main", Shape::default(), TESTBED).unwrap();
    let bed = &scratch.bed;
    bed.load_echo().unwrap();
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let prober = Prober::start(bed.site().unwrap(), Options::default()).unwrap();
    settle(&prober, Duration::from_mins(1));

    let quiet = measure(&prober, Duration::from_secs(10));
    assert_eq!(quiet.lost(), 0, "{}", quiet.table());
    assert_eq!(quiet.kinds.len(), 9, "{}", quiet.table());
    for kind in &quiet.kinds {
        assert!(kind.figures.sent > 0, "no {:?}: {}", kind.kind, quiet.table());
    }

    control::stop_apiserver(bed).unwrap();
    let outage = measure(&prober, Duration::from_secs(8));
    control::start_apiserver(bed).unwrap();
    control::wait(bed).unwrap();
    assert_eq!(outage.lost(), 0, "traffic doesn't need the API: {}", outage.table());

    bed.exec("n2", &["ip", "link", "set", "flannel.1", "down"]).unwrap();
    let broken = measure(&prober, Duration::from_secs(6));
    for flow in &broken.flows {
        let crosses = flow.nodes.iter().any(|node| node == "n2") && flow.nodes.len() > 1;
        match flow.kind {
            // Any of the Service's pods may answer, those of the node without a link too.
            Kind::PodToService | Kind::OutsideToNodePort => {}
            _ => assert_eq!(flow.figures.lost > 0, crosses, "{flow:?}\n{}", broken.table()),
        }
    }

    bed.reboot("n2").unwrap();
    bed.wait_ready().unwrap();
    settle(&prober, Duration::from_mins(2));

    prober.stop().unwrap();
    let bed = &mut scratch.bed;
    bed.add_node(NodeShape::worker("n4")).unwrap();
    bed.wait_ready().unwrap();
    bed.remove_node("n4").unwrap();
    bed.wait_ready().unwrap();
    assert_eq!(bed.get(&["nodes"]).unwrap()["items"].as_array().unwrap().len(), 3);
}

#[test]
fn two_beds_of_unusual_shapes_come_up_at_once_and_leave_each_other_alone() {
    let old = Shape {
        nodes: vec![
            NodeShape { control_plane: true, ..NodeShape::worker("n1") },
            NodeShape { rp_filter: 2, ..NodeShape::worker("n2") },
        ],
        pod_cidr: "10.42.0.0/16".parse().unwrap(),
        node_prefix: 25,
        vni: 4096,
        port: 4789,
        layout: Layout::Older,
        rules: Rules::Legacy,
        ..Shape::default()
    };
    let new = Shape { rules: Rules::Nftables, dual_stack: true, ..two_nodes() };
    // Built before, so that the two don't wait for each other's build.
    let (old, new) = std::thread::scope(|scope| {
        let old = scope.spawn(|| Scratch::up("t-old", old, TESTBED).unwrap());
        let new = scope.spawn(|| Scratch::up("t-new", new, TESTBED).unwrap());
        (old.join().unwrap(), new.join().unwrap())
    });

    let link = old.bed.exec("n1", &["ip", "-d", "link", "show", "flannel.4096"]).unwrap();
    assert!(link.contains("vxlan id 4096") && link.contains("dstport 4789"), "{link}");
    let node = old.bed.get(&["node", "n1"]).unwrap();
    assert!(node["spec"]["podCIDR"].as_str().unwrap().ends_with("/25"), "{node}");
    assert!(node["spec"]["podCIDR"].as_str().unwrap().starts_with("10.42."), "{node}");
    assert!(node["metadata"]["labels"].get("node-role.kubernetes.io/control-plane").is_some(), "{node}");
    assert_eq!(node["spec"]["taints"][0]["effect"], "NoSchedule");
    old.bed.get(&["-n", "kube-system", "daemonset", "kube-flannel-ds-amd64"]).unwrap();
    assert_eq!(old.bed.exec("n2", &["cat", "/proc/sys/net/ipv4/conf/all/rp_filter"]).unwrap().trim(), "2");
    assert_eq!(old.bed.exec("n1", &["cat", "/proc/sys/net/ipv4/conf/all/rp_filter"]).unwrap().trim(), "1");
    let rules = old.bed.exec("n1", &["iptables-legacy-save"]).unwrap();
    assert!(rules.contains("FLANNEL-POSTRTG"), "{rules}");
    let rules = old.bed.exec("n1", &["iptables-nft-save"]).unwrap();
    assert!(!rules.contains("FLANNEL-POSTRTG"), "{rules}");

    let tables = new.bed.exec("n1", &["nft", "list", "tables"]).unwrap();
    assert!(tables.contains("flannel-ipv4") && tables.contains("flannel-ipv6"), "{tables}");
    let node = new.bed.get(&["node", "n2"]).unwrap();
    assert_eq!(node["spec"]["podCIDRs"].as_array().unwrap().len(), 2, "{node}");
    let link = new.bed.exec("n1", &["ip", "-6", "route", "show", "dev", "flannel-v6.1"]).unwrap();
    assert!(link.contains("onlink"), "{link}");

    drop(old);
    new.bed.wait_ready().unwrap();
}

#[test]
fn canal_comes_up_from_its_stock_manifest() {
    let scratch = Scratch::up("t-canal", Shape { layout: Layout::Canal, ..two_nodes() }, TESTBED).unwrap();
    let files = scratch.bed.exec("n1", &["ls", "/etc/cni/net.d"]).unwrap();
    assert!(files.contains("10-canal.conflist"), "{files}");
}

#[test]
fn nothing_stays_of_a_bed_whose_maker_was_killed() {
    let before = Machine::look().unwrap();
    teardown::down("t-killed").unwrap();
    let mut up = Command::new(TESTBED)
        .args(["--name", "t-killed", "up", "--nodes", "2"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    // In the middle: the control plane runs, the nodes are being made.
    run::wait_for("a node begins", Duration::from_mins(2), || {
        Ok(std::path::Path::new("/run/netns/fm-t-killed-n1").exists())
    })
    .unwrap();
    std::thread::sleep(began.elapsed() / 4);
    up.kill().unwrap();
    up.wait().unwrap();
    teardown::down("t-killed").unwrap();
    let left = Machine::look().unwrap().since(&before);
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}

#[test]
fn nothing_stays_of_a_bed_that_ran_and_whose_test_failed() {
    let before = Machine::look().unwrap();
    let failed = std::thread::spawn(|| {
        let scratch = Scratch::up("t-failed", two_nodes(), TESTBED).unwrap();
        scratch.bed.apply_calico().unwrap();
        scratch
            .bed
            .exec(
                "n1",
                &[
                    "sh",
                    "-c",
                    "sleep 1000 >/dev/null 2>&1 & mkdir -p /etc/cni/x /opt/y /var/lib/z /var/log/w",
                ],
            )
            .unwrap();
        panic!("as a test would");
    })
    .join();
    assert!(failed.is_err());
    let left = Machine::look().unwrap().since(&before);
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
}

#[test]
fn wrong_use_ends_with_one_sentence_and_a_status() {
    let refused = |args: &[&str], words: &[&str]| {
        let output = Command::new(TESTBED).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?}: {word:?} is not in {text:?}");
        }
        text
    };
    refused(&["--name", "t-none", "kubectl", "get", "nodes"], &["no test bed \"t-none\" is up", "up"]);
    refused(&["--name", "Wrong", "up"], &["test bed name \"Wrong\""]);
    refused(&["up", "--nodes", "0"], &["nodes: 1 to 50"]);
    refused(&["up", "--pod-cidr", "10.244.0.1/16"], &["10.244.0.1/16", "behind its prefix"]);
    refused(&["up", "--rp-filter", "n9=1"], &["--rp-filter", "no node \"n9\""]);
    refused(&["up", "--layout", "canal", "--dual-stack"], &["canal", "IPv4 only"]);
    refused(&["up", "--colour"], &["--colour"]);
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c"])
        .arg("exec /proc/self/fd/0 up")
        // As an open file, so that it doesn't matter whether the other user may enter the build's directory.
        .stdin(std::fs::File::open(TESTBED).unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("not root"), "{text}");
}

#[test]
fn a_name_that_is_taken_and_a_disk_that_is_full_are_refused() {
    let scratch =
        Scratch::up("t-taken", Shape { nodes: NodeShape::numbered(1), ..Shape::default() }, TESTBED).unwrap();
    let error = Bed::up("t-taken", two_nodes(), TESTBED.as_ref()).unwrap_err();
    assert!(format!("{error:#}").contains("the name \"t-taken\" is taken"), "{error:#}");
    drop(scratch);
    // The same check with a small file system in place of the disk, in a mount namespace of its own.
    let script = format!(
        "mkdir -p /var/tmp && mount -t tmpfs -o size=64m tmpfs /var/tmp && exec {TESTBED} --name t-full up"
    );
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("no room"), "{text}");
}

#[test]
fn a_version_that_cannot_be_had_is_refused_in_one_line_before_anything_is_made() {
    for (option, version, there) in [
        ("--calico", "v9.9.9", "v3.28.5"),
        ("--kubernetes", "1.12.0", "v1.37.2"),
        ("--flannel", "v0.1.0", "v0.28.10"),
        ("--containerd", "v1.6.0", "v2.4.2"),
    ] {
        let output =
            std::process::Command::new(TESTBED).args(["--name", "t-never", "up", option, version]).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        for word in [version, there, "--source", "PARTS_SOURCES"] {
            assert!(said.contains(word), "no {word} in: {said}");
        }
        assert!(!bed::names().unwrap().contains(&"t-never".to_owned()), "{option}");
    }
}
