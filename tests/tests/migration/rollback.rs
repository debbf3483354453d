//! Pause, abort and rollback of a whole cluster, under traffic, and what they leave.

use std::{collections::BTreeMap, process::Command, time::Duration};

use flannel_migration_tests::{
    bed::Bed,
    migration::{self, Job, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL, checks, pods},
    probe::{Options, Prober, Report, Workloads, deploy_to},
    run,
    scratch::Scratch,
    shape::{Layout, NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    authority, bed, complete, expect_migrated, items, label, look, moment, settings::coordinator,
    table::connected,
};

/// The administrator's command, from outside the cluster.
pub fn command(bed: &Bed, args: &[&str]) -> String {
    let mut command = Command::new(coordinator());
    command.env("KUBECONFIG", bed.plan.kubeconfig()).args(args);
    let told = run::output(&mut command).unwrap();
    eprintln!("coordinator {}: {}", args.join(" "), told.trim().replace('\n', "; "));
    told
}

fn log(bed: &Bed) -> String {
    migration::coordinator_log(bed).unwrap_or_default()
}

fn at_rest(bed: &Bed, node: &str, state: &str) -> bool {
    let now = look(bed, node);
    label(&now, STATE_LABEL) == state && label(&now, LEASE_LABEL).is_empty()
}

fn wait_rest(bed: &Bed, node: &str, state: &str) {
    let what = format!("{node} is at rest on {state}");
    run::wait_for(&what, Duration::from_mins(2), || Ok(at_rest(bed, node, state)))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", log(bed)));
}

/// The Job says that the run was ended: it is suspended, and its pods are gone.
fn wait_suspended(bed: &Bed) {
    run::wait_for("the Job is suspended", Duration::from_mins(3), || {
        let job = bed.get(&["-n", "kube-system", "job", "flannel-migration"])?;
        let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let suspended = |c: &Value| c["type"] == "Suspended" && c["status"] == "True";
        let pods = bed.get(&["-n", "kube-system", "pods", "-l", "k8s-app=flannel-migration-controller"])?;
        Ok(conditions.iter().any(suspended) && items(&pods).is_empty())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", log(bed)));
    assert_eq!(migration::job(bed).unwrap(), Job::Running);
}

/// What a migration changes on a host. Kubernetes' own rules are left out, for they follow the pods that come and go.
fn host(bed: &Bed, node: &str) -> BTreeMap<String, String> {
    let mut picture = BTreeMap::new();
    for (what, command) in [
        (
            "links",
            "ip -o -d link | sed -E 's/(group|qlen|tso_max|gso_|gro_|promiscuity|hello_timer|tcn_timer|topology_change_timer|gc_timer|hold_timer|message_age_timer).*//; s/ qdisc [a-z]+//'",
        ),
        // A bridge takes the lowest hardware address of its ports, and keeps the link-local one that it made from an earlier port's.
        ("routes", "ip route show table all | grep -v '^local fe80::.* dev cni0 ' | sort"),
        ("neighbours", "ip neigh show nud permanent | sort"),
        ("forwarding", "bridge fdb show dev flannel.1 | sort"),
        ("forwarding of IPv6", "bridge fdb show dev flannel-v6.1 2>/dev/null | sort"),
        ("addresses", "ip -o -4 address | awk '{print $2, $4}' | sort"),
        ("addresses of IPv6", "ip -o -6 address show scope global | awk '{print $2, $4}' | sort"),
        (
            "settings",
            "for d in /proc/sys/net/ipv4/conf/*; do echo ${d##*/} $(cat $d/rp_filter $d/proxy_arp $d/forwarding); done",
        ),
        // The token of Canal's plugin is another one after each start.
        ("configs", "cd /etc/cni/net.d && for f in *; do echo == $f; sed '/ token: /d' $f; done"),
        (
            "reservations",
            // In Canal only some of them are there.
            "ls /var/lib/cni/networks/* /var/lib/cni/results /var/lib/cni/flannel /run/flannel 2>/dev/null; true",
        ),
        ("sets", "ipset list -n | grep cali || true"),
        // Felix's own; iptables' tables stay where they were needed once.
        ("tables", "nft list tables | grep -w calico | sort"),
        (
            "rules",
            "for save in iptables-nft-save iptables-legacy-save ip6tables-nft-save ip6tables-legacy-save; do \
                   $save 2>/dev/null | grep -v -e '^#' -e '^[:*]' -e COMMIT -e KUBE- ; done | sort",
        ),
    ] {
        picture.insert(what.to_owned(), bed.shell(node, command).unwrap());
    }
    picture
}

/// The API's objects that a migration changes, without what agents say about themselves.
fn objects(bed: &Bed) -> BTreeMap<String, String> {
    let mut picture = BTreeMap::new();
    for node in items(&bed.get(&["nodes"]).unwrap()) {
        let name = node["metadata"]["name"].as_str().unwrap().to_owned();
        let kept = |part: &str| -> BTreeMap<String, Value> {
            let all = node["metadata"][part].as_object().cloned().unwrap_or_default();
            let agents = ["flannel-migration/state", "flannel-migration/report"];
            all.into_iter().filter(|(key, _)| !agents.contains(&key.as_str())).collect()
        };
        picture.insert(
            format!("node {name}"),
            format!("{:#?}", (kept("labels"), kept("annotations"), &node["spec"])),
        );
    }
    for set in items(&bed.get(&["daemonsets", "-A"]).unwrap()) {
        let name = set["metadata"]["name"].as_str().unwrap();
        if name != "flannel-migration-agent" {
            picture.insert(format!("daemonset {name}"), format!("{:#}", set["spec"]));
        }
    }
    for kind in ["ippools", "blockaffinities", "ipamblocks", "ipamhandles"] {
        let kind = format!("{kind}.crd.projectcalico.org");
        let names: Vec<String> =
            items(&bed.get(&[&kind]).unwrap()).iter().map(|o| o["metadata"]["name"].to_string()).collect();
        picture.insert(kind, names.join(" "));
    }
    picture
}

fn compare(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>, whose: &str) {
    for (key, was) in before {
        let is = after.get(key).unwrap_or_else(|| panic!("{whose}: {key} is gone"));
        if is != was {
            let gone: Vec<&str> = was.lines().filter(|line| !is.lines().any(|l| l == *line)).collect();
            let new: Vec<&str> = is.lines().filter(|line| !was.lines().any(|l| l == *line)).collect();
            panic!("{whose}: {key} changed\n- {}\n+ {}", gone.join("\n- "), new.join("\n+ "));
        }
    }
    for key in after.keys() {
        assert!(before.contains_key(key), "{whose}: {key} is new");
    }
}

/// Links that were just made ask around for a second whether their IPv6 addresses are free, and have no routes until then.
fn settled(bed: &Bed) {
    run::wait_for("every link has its addresses", Duration::from_secs(30), || {
        let asking = |node| bed.exec(node, &["ip", "-o", "-6", "address", "show", "tentative"]);
        Ok(asking("n1")?.is_empty() && asking("n2")?.is_empty())
    })
    .unwrap();
}

fn hosts(bed: &Bed) -> BTreeMap<String, BTreeMap<String, String>> {
    ["n1", "n2"].into_iter().map(|node| (node.to_owned(), host(bed, node))).collect()
}

fn lost(report: &Report, when: &str) -> u64 {
    let lost: u64 = report.flows.iter().map(|flow| flow.figures.lost).sum();
    let sent: u64 = report.flows.iter().map(|flow| flow.figures.sent).sum();
    eprintln!("m-rollback: {when}: lost {lost} of {sent}\n{}", report.table());
    lost
}

/// Traffic flows whole again soon.
pub fn expect_connected(prober: &Prober) {
    connected(prober, Duration::from_secs(20));
}

#[test]
fn a_cluster_goes_back_to_flannel_from_half_way_and_from_the_end_as_it_was_before() {
    goes_back("m-rollback", Shape { nodes: NodeShape::numbered(2), ..Shape::default() });
}

#[test]
#[ignore = "takes two minutes; hack/faults runs it"]
fn a_cluster_of_both_families_goes_back_to_flannel_from_half_way_and_from_the_end() {
    goes_back("m-rollback6", Shape { nodes: NodeShape::numbered(2), dual_stack: true, ..Shape::default() });
}

/// A cluster whose workloads run, with nothing that is still on its way.
fn at_work(name: &str, shape: Shape) -> Scratch {
    let scratch = bed(name, shape);
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let rollout = ["-n", "kube-system", "rollout", "status", "deployment/calico-kube-controllers"];
    bed.kubectl(&[&rollout[..], &["--timeout=120s"]].concat()).unwrap();
    settled(bed);
    scratch
}

/// Starts a migration in place under traffic. The coordinator's own node, the second, is the last one.
fn start(bed: &Bed) -> Prober {
    let prober = Prober::start(
        bed.site().unwrap(),
        Options { interval: Duration::from_millis(20), ..Options::default() },
    )
    .unwrap();
    migration::apply_with(bed, &[("STRATEGY", "in-place")], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n2");
    })
    .unwrap();
    prober
}

fn goes_back(name: &str, shape: Shape) {
    let scratch = at_work(name, shape);
    let bed = &scratch.bed;
    let (hosts_before, objects_before, pods_before) =
        (hosts(bed), objects(bed), pods::identities(bed).unwrap());
    let prober = start(bed);
    // Half way: the first node ends what it began, the second isn't started.
    moment(bed, "n1", &["preparing", "prepared", "switching", "verifying"]);
    command(bed, &["pause"]);
    wait_rest(bed, "n1", "calico");
    assert!(at_rest(bed, "n2", "flannel"));
    authority::expect_confined(bed);
    lost(&prober.report().unwrap(), "half way");
    prober.reset().unwrap();
    command(bed, &["rollback"]);
    wait_rest(bed, "n1", "flannel");
    eprintln!("{}", migration::agent_log(bed, "n1").unwrap_or_default());
    wait_suspended(bed);
    lost(&prober.report().unwrap(), "back from half way");
    assert!(pods::differences(&pods_before, &pods::identities(bed).unwrap()).is_empty());
    expect_connected(&prober);
    compare(&objects_before, &objects(bed), "objects");
    for (node, before) in &hosts_before {
        compare(before, &host(bed, node), node);
    }

    // From the end, held before flannel is removed; a pod that Calico made in between is made anew.
    command(bed, &["resume"]);
    moment(bed, "n2", &["preparing", "prepared", "switching", "verifying"]);
    command(bed, &["pause"]);
    wait_rest(bed, "n2", "calico");
    let victim =
        pods_before.values().find(|pod| pod.node == "n2" && pod.name.starts_with("probe/web")).unwrap();
    let name = victim.name.split_once('/').unwrap().1;
    bed.kubectl(&["-n", "probe", "delete", "pod", name]).unwrap();
    let count = pods_before.len();
    run::wait_for("its successor runs", Duration::from_secs(30), || {
        Ok(pods::identities(bed)?.len() == count && checks::pods(bed)?.is_empty())
    })
    .unwrap();
    assert_eq!(migration::job(bed).unwrap(), Job::Running);
    let with_guest = pods::identities(bed).unwrap();
    expect_connected(&prober);
    prober.reset().unwrap();
    command(bed, &["rollback"]);
    wait_suspended(bed);
    lost(&prober.report().unwrap(), "back from the end");
    run::wait_for("pods are Ready", Duration::from_secs(30), || Ok(checks::pods(bed)?.is_empty())).unwrap();
    expect_connected(&prober);
    compare(&objects_before, &objects(bed), "objects");
    let changed = pods::differences(&with_guest, &pods::identities(bed).unwrap());
    assert_eq!(pods::differences(&pods_before, &with_guest).len(), 1);
    assert_eq!(changed.len(), 1, "only the pod of Calico's making is made anew: {}", changed.join("\n"));
    for (node, before) in &hosts_before {
        let now = host(bed, node);
        assert_eq!(
            before["rules"].lines().filter(|l| l.contains("FLANNEL")).count(),
            now["rules"].lines().filter(|l| l.contains("FLANNEL")).count(),
            "{node}"
        );
        for (what, text) in &now {
            assert!(!text.contains("cali"), "{node}: {what} still hold something of Calico's:\n{text}");
        }
    }

    // An abort ends with a working cluster of two networks, which can be taken back all the same.
    if std::env::var_os("FAULTS").is_some() {
        abort(bed, &prober);
    }
    // Then nothing of ours is left.
    migration::delete(bed).unwrap();
    compare(&objects_before, &objects(bed), "objects");
    prober.stop().unwrap();
}

/// In Canal, Felix runs before and after, and its rules come and go with it: they aren't compared. Nor is Canal's own pool, from which no
/// pod has an address: each of Canal's pods makes it at its start, when there is none.
#[test]
fn canal_goes_back_from_half_way_and_from_the_end_as_it_was_before() {
    let shape = Shape { nodes: NodeShape::numbered(2), layout: Layout::Canal, ..Shape::default() };
    let scratch = at_work("m-canal-back", shape);
    let bed = &scratch.bed;
    let shown = |node: &str| {
        let mut picture = host(bed, node);
        picture.retain(|what, _| !["rules", "sets"].contains(&what.as_str()));
        picture
    };
    let kept = || {
        let mut objects = objects(bed);
        objects.remove("ippools.crd.projectcalico.org");
        objects
    };
    let (objects_before, pods_before) = (kept(), pods::identities(bed).unwrap());
    let before = ["n1", "n2"].map(|node| (node, shown(node)));
    let prober = start(bed);
    for (last, when) in [("n1", "half way"), ("n2", "the end")] {
        moment(bed, last, &["preparing", "prepared", "switching", "verifying"]);
        command(bed, &["pause"]);
        wait_rest(bed, last, "calico");
        expect_connected(&prober);
        prober.reset().unwrap();
        command(bed, &["rollback"]);
        wait_suspended(bed);
        lost(&prober.report().unwrap(), &format!("Canal, back from {when}"));
        expect_connected(&prober);
        assert!(pods::differences(&pods_before, &pods::identities(bed).unwrap()).is_empty());
        compare(&objects_before, &kept(), "objects");
        for (node, before) in &before {
            compare(before, &shown(node), node);
        }
        command(bed, &["resume"]);
    }
    complete(bed, Duration::from_mins(2));
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}

fn abort(bed: &Bed, prober: &Prober) {
    command(bed, &["resume"]);
    moment(bed, "n2", &["preparing", "prepared", "switching", "verifying"]);
    command(bed, &["abort"]);
    wait_suspended(bed);
    wait_rest(bed, "n1", "calico");
    let n2 = look(bed, "n2");
    assert!(
        ["flannel", "calico"].contains(&label(&n2, STATE_LABEL).as_str())
            && label(&n2, LEASE_LABEL).is_empty()
    );
    assert_eq!(label(&n2, NETWORK_LABEL), label(&n2, STATE_LABEL));
    assert_ne!(n2["spec"]["unschedulable"], json!(true));
    expect_connected(prober);

    command(bed, &["rollback"]);
    wait_suspended(bed);
    expect_connected(prober);
}
