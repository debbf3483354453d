//! The pods with a network of their own, before and after.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use crate::bed::Bed;

/// What must not change about a pod that is taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `namespace/name`.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    pub address: String,
    /// Restarts of its containers.
    pub restarts: u64,
    /// Start times of its running containers.
    pub started: Vec<String>,
}

/// Every running pod that isn't on its node's own network, by UID.
pub fn identities(bed: &Bed) -> Result<BTreeMap<String, Identity>> {
    let list = bed.get(&["pods", "--all-namespaces"])?;
    let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(items.iter().filter(|pod| is_on_pod_network(pod)).filter_map(identity).collect())
}

/// What became different between two pictures, a line each: replaced, gone, restarted, moved.
#[must_use]
pub fn differences(before: &BTreeMap<String, Identity>, after: &BTreeMap<String, Identity>) -> Vec<String> {
    let mut lines = Vec::new();
    for (uid, was) in before {
        match after.get(uid) {
            None => lines.push(format!("{} on {} was replaced", was.name, was.node)),
            Some(is) if is != was => {
                lines.push(format!("{} on {} changed: {was:?} -> {is:?}", was.name, was.node));
            }
            Some(_) => {}
        }
    }
    lines
}

fn is_on_pod_network(pod: &Value) -> bool {
    pod.pointer("/spec/hostNetwork") != Some(&Value::Bool(true))
        && pod.pointer("/status/phase").and_then(Value::as_str) == Some("Running")
}

/// A pod's addresses, of both families.
pub(super) fn addresses(pod: &Value) -> Vec<&str> {
    let all = pod.pointer("/status/podIPs").and_then(Value::as_array).into_iter().flatten();
    all.filter_map(|pod_ip| pod_ip.get("ip")?.as_str()).collect()
}

fn identity(pod: &Value) -> Option<(String, Identity)> {
    let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let containers = pod.pointer("/status/containerStatuses").and_then(Value::as_array)?;
    let started = |status: &Value| status.pointer("/state/running/startedAt")?.as_str().map(str::to_owned);
    Some((
        text("/metadata/uid")?,
        Identity {
            name: format!("{}/{}", text("/metadata/namespace")?, text("/metadata/name")?),
            node: text("/spec/nodeName")?,
            address: addresses(pod).join(","),
            restarts: containers.iter().filter_map(|status| status.get("restartCount")?.as_u64()).sum(),
            started: containers.iter().filter_map(started).collect(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        Identity {
            name: name.into(),
            node: "n1".into(),
            address: "10.0.0.1".into(),
            restarts: 0,
            started: vec![],
        }
    }

    #[test]
    fn a_replaced_and_a_restarted_pod_are_told_and_a_new_one_is_not() {
        let before = BTreeMap::from([("1", identity("a")), ("2", identity("b")), ("3", identity("c"))]);
        let mut after = before.clone();
        after.remove("1");
        after.insert("4", identity("d"));
        after.get_mut("2").unwrap().restarts = 1;
        let own = |map: BTreeMap<&str, Identity>| map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let lines = differences(&own(before), &own(after));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].contains("a on n1 was replaced") && lines[1].contains("b on n1 changed"),
            "{lines:?}"
        );
    }
}
