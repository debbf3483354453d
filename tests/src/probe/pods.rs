//! Which pod fills which slot, and what became of the pods of a workload. Pure: pods are handed in as they are seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::flow::Slot;

/// What matters of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// `metadata.uid`.
    pub uid: String,
    /// The workload that owns it, as `Kind/name`; a `ReplicaSet`'s pod belongs to its `Deployment`.
    pub workload: String,
    /// The node it runs on, once scheduled.
    pub node: Option<String>,
    /// `status.podIP`.
    pub address: Option<IpAddr>,
    /// The first of `status.podIPs` that is of IPv6, beside one of IPv4.
    pub address_v6: Option<IpAddr>,
    /// containerd's id of a running container of it.
    pub container: Option<String>,
    /// Sum of the restart counts of all its containers.
    pub restarts: u64,
    /// Condition `Ready`, and not being deleted.
    pub ready: bool,
    /// Disrupted by the eviction API, preemption, a taint, or the kubelet.
    pub evicted: bool,
    /// Being deleted, or ended.
    pub leaving: bool,
}

impl PodFacts {
    /// Reads a pod; `None` for one without a controller or without a UID.
    #[must_use]
    pub fn read(pod: &Pod) -> Option<Self> {
        let meta = &pod.metadata;
        let owner = meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))?;
        let hash = meta.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
        let workload = match (owner.kind.as_str(), hash) {
            ("ReplicaSet", Some(hash)) => {
                let name = owner.name.strip_suffix(&format!("-{hash}")).unwrap_or(&owner.name);
                format!("Deployment/{name}")
            }
            (kind, _) => format!("{kind}/{}", owner.name),
        };
        let status = pod.status.clone().unwrap_or_default();
        let condition = |kind: &str| {
            status.conditions.iter().flatten().any(|found| found.type_ == kind && found.status == "True")
        };
        let containers = || status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let leaving = meta.deletion_timestamp.is_some() || ended;
        Some(Self {
            uid: meta.uid.clone()?,
            workload,
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            address: status.pod_ip.as_deref().and_then(|address| address.parse().ok()),
            address_v6: status
                .pod_ips
                .iter()
                .flatten()
                .filter_map(|pod_ip| pod_ip.ip.parse().ok())
                .find(IpAddr::is_ipv6),
            container: status
                .container_statuses
                .iter()
                .flatten()
                .filter(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
                .find_map(|container| container.container_id.as_deref()?.strip_prefix("containerd://"))
                .map(str::to_owned),
            restarts: containers().map(|container| u64::from(container.restart_count.unsigned_abs())).sum(),
            ready: condition("Ready") && !leaving,
            evicted: condition("DisruptionTarget") || status.reason.as_deref() == Some("Evicted"),
            leaving,
        })
    }
}

/// What became of one workload's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// Pods wanted: as many as there are slots.
    pub pods: u64,
    /// Container restarts.
    pub restarts: u64,
    /// Pods seen to be evicted.
    pub evicted: u64,
    /// Pods whose place another pod took.
    pub replaced: u64,
    /// Pods that kept their UID and changed their address.
    pub readdressed: u64,
    /// Times the workload fell below full readiness.
    pub below_full: u64,
    /// Time spent below full readiness.
    pub below_full_for: Duration,
    /// Fewest ready pods at any moment.
    pub least_ready: u64,
}

#[derive(Debug, Default)]
struct Workload {
    fate: Fate,
    below_since: Option<Duration>,
}

/// All pods seen, by slot.
#[derive(Debug, Default)]
pub struct Census {
    pods: BTreeMap<String, PodFacts>,
    slots: BTreeMap<Slot, String>,
    /// UIDs that have had a slot: a late word about an old pod must not give it the slot back.
    placed: BTreeSet<String>,
    workloads: BTreeMap<String, Workload>,
}

impl Census {
    /// Takes a pod as it is now. Returns its slot if it is the one that fills it.
    pub fn see(&mut self, pod: PodFacts, now: Duration) -> Option<Slot> {
        let before = self.pods.get(&pod.uid);
        let fate = &mut self.workloads.entry(pod.workload.clone()).or_default().fate;
        fate.evicted += u64::from(pod.evicted && !before.is_some_and(|before| before.evicted));
        if let Some(before) = before {
            fate.restarts += pod.restarts.saturating_sub(before.restarts);
            let moved = |before: Option<IpAddr>, now: Option<IpAddr>| {
                before.is_some() && now != before && now.is_some()
            };
            let either = moved(before.address, pod.address) || moved(before.address_v6, pod.address_v6);
            fate.readdressed += u64::from(either);
        }
        let slot = self.place(&pod);
        let workload = pod.workload.clone();
        self.pods.insert(pod.uid.clone(), pod);
        self.judge_readiness(&workload, now);
        slot
    }

    /// Takes note that a pod is no more.
    pub fn miss(&mut self, uid: &str, now: Duration) {
        if let Some(pod) = self.pods.remove(uid) {
            self.judge_readiness(&pod.workload, now);
        }
    }

    /// Takes note that only these pods exist: what else was known has gone while nobody watched.
    pub fn keep_only(&mut self, uids: &BTreeSet<String>, now: Duration) {
        let gone: Vec<String> = self.pods.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        for uid in gone {
            self.miss(&uid, now);
        }
    }

    /// Begins a new count from the present state.
    pub fn reset(&mut self, now: Duration) {
        let names: Vec<String> = self.workloads.keys().cloned().collect();
        for name in names {
            let pods = self.pods_of(&name);
            self.workloads.insert(
                name.clone(),
                Workload { fate: Fate { pods, least_ready: pods, ..Fate::default() }, below_since: None },
            );
            self.judge_readiness(&name, now);
        }
    }

    /// What became of each workload, by `Kind/name`, up to `now`.
    #[must_use]
    pub fn fates(&self, now: Duration) -> BTreeMap<String, Fate> {
        self.workloads
            .iter()
            .map(|(name, workload)| {
                let mut fate = workload.fate.clone();
                fate.below_full_for +=
                    workload.below_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
                (name.clone(), fate)
            })
            .collect()
    }

    /// The pod that fills a slot, if it still exists.
    #[must_use]
    pub fn occupant(&self, slot: &Slot) -> Option<&PodFacts> {
        self.pods.get(self.slots.get(slot)?)
    }

    fn place(&mut self, pod: &PodFacts) -> Option<Slot> {
        if self.placed.contains(&pod.uid) {
            return self.slots.iter().find(|(_, uid)| **uid == pod.uid).map(|(slot, _)| slot.clone());
        }
        if pod.leaving {
            return None;
        }
        let place = if pod.workload.starts_with("DaemonSet/") {
            pod.node.clone()?
        } else {
            self.vacancy(&pod.workload)
        };
        let slot = Slot { workload: pod.workload.clone(), place };
        self.placed.insert(pod.uid.clone());
        let replaced = self.slots.insert(slot.clone(), pod.uid.clone()).is_some();
        let pods = self.pods_of(&pod.workload);
        let fate = &mut self.workloads.entry(pod.workload.clone()).or_default().fate;
        fate.replaced += u64::from(replaced);
        fate.pods = pods;
        Some(slot)
    }

    /// The lowest ordinal whose pod is gone or going, or a new one.
    fn vacancy(&self, workload: &str) -> String {
        let slots = self.slots.iter().filter(|(slot, _)| slot.workload == workload);
        let vacant = |uid: &String| self.pods.get(uid).is_none_or(|pod| pod.leaving);
        slots
            .clone()
            .find(|(_, uid)| vacant(uid))
            .map_or_else(|| format!("{:03}", slots.count()), |(slot, _)| slot.place.clone())
    }

    fn pods_of(&self, workload: &str) -> u64 {
        self.slots.keys().filter(|slot| slot.workload == workload).count() as u64
    }

    fn judge_readiness(&mut self, name: &str, now: Duration) {
        let pods = self.pods_of(name);
        let ready = self
            .slots
            .iter()
            .filter(|(slot, _)| slot.workload == name)
            .filter(|(_, uid)| self.pods.get(*uid).is_some_and(|pod| pod.ready))
            .count() as u64;
        let Some(workload) = self.workloads.get_mut(name) else { return };
        let fate = &mut workload.fate;
        fate.least_ready = fate.least_ready.min(ready);
        match workload.below_since {
            None if ready < pods => {
                fate.below_full += 1;
                workload.below_since = Some(now);
            }
            Some(since) if ready >= pods => {
                fate.below_full_for += now.saturating_sub(since);
                workload.below_since = None;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, workload: &str, node: &str) -> PodFacts {
        PodFacts {
            uid: uid.into(),
            workload: workload.into(),
            node: Some(node.into()),
            address: Some(IpAddr::from([10, 244, 0, 2])),
            address_v6: None,
            container: Some("c".into()),
            restarts: 0,
            ready: true,
            evicted: false,
            leaving: false,
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn census(pods: &[PodFacts]) -> Census {
        let mut census = Census::default();
        for pod in pods {
            census.see(pod.clone(), at(0));
        }
        census.reset(at(0));
        census
    }

    #[test]
    fn a_pod_is_read_from_what_the_api_says() {
        let text = json!({
            "metadata": {"name": "web-5d-x", "uid": "u1", "labels": {"pod-template-hash": "5d"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d", "uid": "r", "controller": true}]},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIP": "10.244.1.9", "podIPs": [{"ip": "10.244.1.9"}, {"ip": "fd00::9"}],
                "conditions": [{"type": "Ready", "status": "True"}, {"type": "DisruptionTarget", "status": "True"}],
                "containerStatuses": [{"name": "echo", "image": "", "imageID": "", "ready": true, "restartCount": 2,
                    "containerID": "containerd://abc", "state": {"running": {}}}]}});
        let pod: Pod = serde_json::from_value(text).unwrap();
        let facts = PodFacts::read(&pod).unwrap();
        assert_eq!(facts.workload, "Deployment/web");
        assert_eq!(facts.container.as_deref(), Some("abc"));
        assert_eq!(facts.address, Some(IpAddr::from([10, 244, 1, 9])));
        assert_eq!(facts.address_v6, "fd00::9".parse().ok());
        assert!(facts.ready && facts.evicted && !facts.leaving);
        assert_eq!(facts.restarts, 2);
    }

    #[test]
    fn a_quiet_workload_has_no_fate() {
        let mut census = census(&[pod("a", "DaemonSet/echo", "n1"), pod("b", "DaemonSet/echo", "n2")]);
        census.see(pod("a", "DaemonSet/echo", "n1"), at(5));
        let expected = Fate { pods: 2, least_ready: 2, ..Fate::default() };
        assert_eq!(census.fates(at(9))["DaemonSet/echo"], expected);
    }

    #[test]
    fn the_next_pod_of_a_daemon_set_on_a_node_takes_the_slot() {
        let mut census = census(&[pod("a", "DaemonSet/echo", "n1"), pod("b", "DaemonSet/echo", "n2")]);
        let gone = PodFacts { ready: false, leaving: true, ..pod("a", "DaemonSet/echo", "n1") };
        census.see(gone.clone(), at(1));
        let slot = census.see(PodFacts { ready: false, ..pod("c", "DaemonSet/echo", "n1") }, at(2));
        assert_eq!(slot, Some(Slot::daemon("echo", "n1")));
        assert_eq!(census.see(gone, at(3)), None, "the old one's last word");
        census.miss("a", at(3));
        census.see(pod("c", "DaemonSet/echo", "n1"), at(4));
        let fate = &census.fates(at(9))["DaemonSet/echo"];
        assert_eq!((fate.replaced, fate.evicted, fate.restarts), (1, 0, 0));
        assert_eq!((fate.below_full, fate.below_full_for, fate.least_ready), (1, at(3), 1));
        assert_eq!(census.occupant(&Slot::daemon("echo", "n1")).unwrap().uid, "c");
    }

    #[test]
    fn a_new_pod_of_a_deployment_takes_the_place_of_one_that_left() {
        let mut census = census(&[pod("a", "Deployment/web", "n1"), pod("b", "Deployment/web", "n1")]);
        census.see(
            PodFacts { evicted: true, leaving: true, ready: false, ..pod("b", "Deployment/web", "n1") },
            at(1),
        );
        let slot = census.see(pod("c", "Deployment/web", "n2"), at(2)).unwrap();
        assert_eq!(slot.place, "001");
        assert_eq!(census.see(pod("d", "Deployment/web", "n2"), at(3)).unwrap().place, "002", "one more");
        let fate = &census.fates(at(9))["Deployment/web"];
        assert_eq!((fate.evicted, fate.replaced, fate.pods, fate.least_ready), (1, 1, 3, 1));
    }

    #[test]
    fn restarts_and_new_addresses_are_counted_as_they_rise() {
        let mut census = census(&[PodFacts { restarts: 3, ..pod("a", "DaemonSet/echo", "n1") }]);
        for restarts in [3, 4, 4, 6] {
            census.see(PodFacts { restarts, ..pod("a", "DaemonSet/echo", "n1") }, at(1));
        }
        let elsewhere = PodFacts {
            address: Some(IpAddr::from([10, 0, 0, 9])),
            restarts: 6,
            ..pod("a", "DaemonSet/echo", "n1")
        };
        census.see(elsewhere, at(2));
        let fate = &census.fates(at(9))["DaemonSet/echo"];
        assert_eq!((fate.restarts, fate.readdressed, fate.replaced), (3, 1, 0));
    }

    #[test]
    fn pods_that_went_while_nobody_watched_are_missed_and_then_replaced() {
        let mut census = census(&[pod("a", "DaemonSet/echo", "n1")]);
        census.keep_only(&BTreeSet::from(["b".to_owned()]), at(10));
        census.see(pod("b", "DaemonSet/echo", "n1"), at(10));
        let fate = &census.fates(at(20))["DaemonSet/echo"];
        assert_eq!((fate.replaced, fate.below_full), (1, 1));
    }
}
