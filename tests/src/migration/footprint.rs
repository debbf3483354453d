//! What a network leaves on nodes and in the API: one line per thing, without what differs from cluster to cluster by chance
//! (addresses, hashes, indices, names of pods), so that two clusters can be compared.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use regex::Regex;
use serde_json::Value;

use super::checks::items;
use crate::{bed::Bed, run};

/// What was found: for each thing, where it is (`node`, `api`) and what it is.
pub type Footprint = BTreeSet<String>;

/// Commands whose output is compared, by name. Pods' own links are looked at as one: how many there are doesn't matter.
const COMMANDS: [(&str, &str); 14] = [
    ("link", "ip -d -o link | sed 's/^[0-9]*: //'"),
    ("address", "ip -o address | sed 's/^[0-9]*: //'"),
    ("route", "ip route"),
    ("route6", "ip -6 route"),
    ("rule", "ip rule; ip -6 rule"),
    ("neighbour", "ip neigh show dev vxlan.calico nud permanent; bridge fdb show dev vxlan.calico"),
    ("iptables-nft", "iptables-nft-save 2>/dev/null"),
    ("iptables-legacy", "iptables-legacy-save 2>/dev/null || true"),
    ("ip6tables-nft", "ip6tables-nft-save 2>/dev/null"),
    ("ip6tables-legacy", "ip6tables-legacy-save 2>/dev/null || true"),
    ("nft", "nft list tables"),
    // Without the elements of sets and maps, which are addresses and interfaces of pods.
    ("felix", "nft list tables | grep -w calico | while read -r table; do nft --terse list $table; done"),
    (
        "file",
        "find /etc/cni /opt/cni /var/lib/cni /run/flannel* /var/lib/flannel* /run/systemd /run/xtables.lock /var/lib/calico \
         /var/log/calico 2>/dev/null || true",
    ),
    ("conflist", "cat /etc/cni/net.d/*.conflist"),
];

/// Settings of the kernel that are compared.
const SETTINGS: &str = "cd /proc/sys/net; for i in ipv4/conf/all ipv4/conf/default ipv4/conf/eth0 ipv4/conf/vxlan.calico ipv4/conf/cali* \
     ipv4/neigh/cali* ipv6/conf/vxlan.calico; do for k in rp_filter proxy_arp forwarding route_localnet proxy_delay; do \
     [ -e $i/$k ] && echo \"$i/$k = $(cat $i/$k)\"; done; done; cat ipv4/ip_forward";

/// Looks at a whole cluster until two looks in succession are equal: pods and links that have just come aren't what they will be.
pub fn settled(bed: &Bed) -> Result<Footprint> {
    let mut last = look(bed)?;
    run::wait_for("nothing changes any more", Duration::from_mins(2), || {
        std::thread::sleep(Duration::from_secs(3));
        let before = std::mem::replace(&mut last, look(bed)?);
        Ok(before == last)
    })?;
    Ok(last)
}

/// Looks at a whole cluster.
pub fn look(bed: &Bed) -> Result<Footprint> {
    let mut found = Footprint::new();
    let chance = Chance::of(bed)?;
    for node in &bed.nodes {
        for (what, command) in COMMANDS.into_iter().chain([("setting", SETTINGS)]) {
            let output = bed.shell(&node.shape.name, command)?;
            let mut table = String::new();
            for line in output.lines().filter(|line| !line.starts_with('#') && !line.contains("KUBE-S")) {
                if line.starts_with('*') {
                    line.clone_into(&mut table);
                }
                let line = chance.strike(line);
                if !line.is_empty() && line != "COMMIT" {
                    found.insert(format!("node {what} {table} {line}").replace("  ", " "));
                }
            }
        }
    }
    objects(bed, &chance, &mut found)?;
    Ok(found)
}

/// Names of all objects that aren't a workload's, and the whole of those that configure the network.
fn objects(bed: &Bed, chance: &Chance, found: &mut Footprint) -> Result<()> {
    let kinds = bed.kubectl(&["api-resources", "--verbs=list", "-o", "name"])?;
    let kinds: Vec<&str> = kinds.lines().filter(|kind| !UNRELATED.contains(kind)).collect();
    for object in items(&bed.get(&[&kinds.join(","), "--all-namespaces"])?) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        if text("/metadata/namespace") == "probe" {
            continue;
        }
        let kind = kind_of(&object);
        let name =
            chance.strike(&format!("{kind} {}/{}", text("/metadata/namespace"), text("/metadata/name")));
        found.insert(format!("api {name}"));
        for part in ["labels", "annotations"] {
            let texts = object.pointer(&format!("/metadata/{part}")).and_then(Value::as_object);
            found.extend(texts.into_iter().flatten().map(|(key, _)| format!("api {name} {part} {key}")));
        }
        let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
        for condition in conditions.into_iter().flatten() {
            let text = |key: &str| condition.get(key).and_then(Value::as_str).unwrap_or_default();
            found.insert(format!("api {name} condition {} {}", text("type"), text("reason")));
        }
        let networks_own =
            text("/metadata/name") == "calico-node" || text("/metadata/name") == "calico-config";
        for part in ["spec", "data"] {
            if let Some(value) = object.get(part)
                && (networks_own || kind.ends_with(".crd.projectcalico.org"))
            {
                flatten(value, &format!("api {kind} {part}"), chance, found);
            }
        }
    }
    Ok(())
}

/// An object's kind with its group, for people: `Node`, `IPPool.crd.projectcalico.org`.
fn kind_of(object: &Value) -> String {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    match text("apiVersion").split_once('/') {
        Some((group, _)) => format!("{}.{group}", text("kind")),
        None => text("kind").to_owned(),
    }
}

/// Kinds that come and go with the workload or by the second.
const UNRELATED: [&str; 8] = [
    "pods",
    "events",
    "events.events.k8s.io",
    "endpoints",
    "endpointslices.discovery.k8s.io",
    "leases.coordination.k8s.io",
    "replicasets.apps",
    "controllerrevisions.apps",
];

/// A line for each scalar.
fn flatten(value: &Value, path: &str, chance: &Chance, found: &mut Footprint) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                if !OF_THE_MOMENT.contains(&key.as_str()) {
                    flatten(value, &format!("{path}.{key}"), chance, found);
                }
            }
        }
        Value::Array(values) => {
            for value in values {
                flatten(value, &format!("{path}[]"), chance, found);
            }
        }
        scalar => {
            let text = scalar.as_str().map_or_else(|| scalar.to_string(), str::to_owned);
            found.insert(format!("{} = {}", chance.strike(path), chance.strike(&text)));
        }
    }
}

/// Fields that are different each time.
const OF_THE_MOMENT: [&str; 14] = [
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "managedFields",
    "name",
    "sequenceNumber",
    "sequenceNumberForAllocation",
    "allocations",
    "unallocated",
    "timestamp",
    "clusterGUID",
    "block",
    "handleID",
];

/// What differs by chance, and what is written in its place; in this order.
struct Chance {
    patterns: Vec<(Regex, &'static str)>,
}

impl Chance {
    fn of(bed: &Bed) -> Result<Self> {
        let mut patterns = Vec::new();
        let (network, index) = (bed.shape.pod_cidr.to_string(), bed.plan.index);
        let prefix = |octets: usize| {
            let address = network.split('/').next().unwrap_or_default();
            address.split('.').take(octets).collect::<Vec<_>>().join(r"\.")
        };
        let octets = if network.ends_with("/8") { 1 } else { 2 };
        for (pattern, instead) in [
            (format!(r"\bfd00:172:31:{index:x}::/64"), "<nodes>"),
            (format!(r"172\.31\.{index}\.1\b|fd00:172:31:{index:x}::1\b"), "<gateway>"),
            (format!(r"172\.31\.{index}\.2\b"), "<control>"),
            (format!(r"(172\.31\.{index}|fd00:172:31:{index:x}:)[.:][0-9a-f]+\b"), "<node>"),
            (format!(r"\b{}\b", regex::escape(&network)), "<network>"),
            (format!(r"\b{}(\.[0-9]+)+\b", prefix(octets)), "<pod>"),
            (format!(r"\b{}(-[0-9]+)+\b", prefix(octets).replace(r"\.", "-")), "<pod>"),
            (r"\b10\.96\.[0-9]+\.[0-9]+\b".to_owned(), "<service>"),
        ] {
            patterns.push((Regex::new(&pattern)?, instead));
        }
        for (pattern, instead) in [
            // A rule's hash, a chain's counters.
            // Felix makes a chain of its own for interfaces that begin alike, where there happen to be some.
            (r"^-A cali-(from|to)-wl-dispatch .* -g cali-(from|to)-wl-dispatch-[0-9a-f]+$", ""),
            (r"(wl-dispatch)-[0-9a-f]+", "$1"),
            ("cali:[A-Za-z0-9_-]{16}", "cali:<hash>"),
            (r"\[[0-9]+:[0-9]+\]", ""),
            (r"\bcounter packets [0-9]+ bytes [0-9]+", "counter"),
            // The interface of a pod, its peer.
            ("cali[0-9a-f]{11}(@[a-z0-9]+)?", "cali<pod>"),
            (r"@if[0-9]+", ""),
            (r"link-netns(id)? [^ ]+", "link-netns"),
            (r"cali[0-9a-f]+\+ ", "cali<pod> "),
            (r"promiscuity [0-9]+ allmulti [0-9]+ minmtu [0-9]+ maxmtu [0-9]+", ""),
            (r"(gso|gro|tso)_max_[a-z0-9_]+ [0-9]+", ""),
            (r"\bKUBE-([A-Z]+)-[A-Z0-9]{16}", "KUBE-$1-<id>"),
            (r"hostname-hash = .*", "hostname-hash = <hash>"),
            (r"-[0-9a-z]{8,10}-[0-9a-z]{5}$|echo2?-[0-9a-z]{5}", "-<id>"),
            (r"fe80:[0-9a-f:]+", "<link-local>"),
            ("ee:ee:ee:ee:ee:ee", "<every-pods-mac>"),
            (r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "<mac>"),
            (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-f]{16,}\b", "<id>"),
            (r"\bn[0-9]+\b", "<name>"),
            (r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z", "<time>"),
            (r"qlen [0-9]+", ""),
            // An address that the kernel has just made.
            (r"\btentative\b", ""),
            // A NodePort; one of many orders.
            (r"--dport 3[0-9]{4}", "--dport <node-port>"),
        ] {
            patterns.push((Regex::new(pattern)?, instead));
        }
        Ok(Self { patterns })
    }

    /// The line without it.
    fn strike(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for (pattern, instead) in &self.patterns {
            line = pattern.replace_all(&line, *instead).into_owned();
        }
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}
