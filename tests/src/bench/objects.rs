//! A big cluster as the API server knows it: nodes that are objects, with everything on them that flannel, kubelets and agents write.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, api::PostParams};
use serde_json::{Value, json};

use crate::{
    bed::{
        Bed, control,
        flannel::{documents, manifest},
    },
    migration, probe, run,
    shape::Shape,
};

/// Length of a node's share of the pod network: one block of Calico's.
pub const NODE_PREFIX: u8 = 26;
/// How many nodes are made at once.
const AT_ONCE: usize = 16;

/// The shape of the cluster: room for 65,536 nodes.
pub fn shape() -> Result<Shape> {
    Ok(Shape { pod_cidr: "10.0.0.0/10".parse()?, node_prefix: NODE_PREFIX, ..Shape::default() })
}

/// A node's name.
#[must_use]
pub fn name(number: u32) -> String {
    format!("s{number:05}")
}

/// The number in a node's name.
#[must_use]
pub fn number(name: &str) -> Option<u32> {
    name.strip_prefix('s')?.parse().ok()
}

/// An address of a node's share of the pod network, from 0.
#[must_use]
pub fn pod_address(number: u32, host: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + (number << (32 - NODE_PREFIX)) + host)
}

/// A node's own address.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(172, 16, 0, 10).to_bits() + number)
}

/// A Node that flannel runs on, ready, with a report of its agent at rest and with the images that its kubelet reports.
#[must_use]
pub fn node(number: u32, images: &[String]) -> Value {
    let prefix = "flannel.alpha.coreos.com";
    let [_, a, b, c] = number.to_be_bytes();
    let mac = format!("8e:74:9a:{a:02x}:{b:02x}:{c:02x}");
    let (name, address) = (name(number), address(number));
    let cidr = format!("{}/{NODE_PREFIX}", pod_address(number, 0));
    let host = json!({
        "rpFilter": 1,
        "vxlan": [{ "name": "flannel.1", "vni": 1, "port": 8472, "mac": mac, "mtu": 1450 }],
        "plugins": ["bandwidth", "bridge", "flannel", "host-local", "loopback", "portmap", "tuning"],
        "interfaces": [{ "name": "eth0", "addresses": [format!("{address}/16")] }],
    });
    let report =
        json!({ "state": "flannel", "since": "2026-01-02T03:04:05Z", "reason": "Started", "host": host });
    // Kubelets report up to 50 images; what they are doesn't matter, their size does.
    let others = (0..20).map(|i| format!("registry.example.org/team/application-{i}:v1.{i}.0"));
    let images: Vec<Value> = images
        .iter()
        .cloned()
        .chain(others)
        .map(|image| json!({ "names": [image], "sizeBytes": 104_857_600 }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name,
                "flannel-migration/state": "flannel",
            },
            "annotations": {
                format!("{prefix}/backend-type"): "vxlan",
                format!("{prefix}/backend-data"): json!({ "VNI": 1, "VtepMAC": mac }).to_string(),
                format!("{prefix}/public-ip"): address.to_string(),
                format!("{prefix}/kube-subnet-manager"): "true",
                "flannel-migration/report": report.to_string(),
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name }],
            "capacity": { "cpu": "4", "memory": "8Gi", "pods": "110" },
            "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "110" },
            "conditions": [{
                "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                "lastHeartbeatTime": "2026-01-02T03:04:05Z", "lastTransitionTime": "2026-01-02T03:04:05Z",
            }],
            "images": images,
        },
    })
}

/// Everything but the nodes: flannel's objects, Calico's and ours, and no controller that would make pods of them.
pub fn furnish(bed: &Bed) -> Result<()> {
    run::wait_for("the controllers run", Duration::from_mins(1), || {
        bed.kubectl(&["-n", "kube-system", "get", "serviceaccount", "default"]).map(|_| true)
    })?;
    // First, so that nothing is made that would have to be unmade: three DaemonSets on thousands of nodes, taints, heartbeats.
    control::stop_controllers(bed)?;
    bed.apply(&manifest(&bed.parts, &bed.shape)?)?;
    bed.apply_calico()?;
    // New definitions aren't served at once.
    let kinds = "ippools,ipamblocks,ipamhandles,blockaffinities,felixconfigurations";
    run::wait_for("Calico's definitions are served", Duration::from_mins(1), || {
        bed.kubectl(&["get", kinds, "--all-namespaces"]).map(|_| true)
    })?;
    migration::apply(bed, &[])
}

/// Makes nodes 1 to `count`.
pub fn make_nodes(bed: &Bed, count: u32) -> Result<()> {
    let images = calico_images(bed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let nodes: Api<Node> = Api::all(probe::client(&bed.plan.kubeconfig()).await?);
        let make = |number: u32| {
            let (nodes, value) = (nodes.clone(), node(number, &images));
            async move {
                let node: Node = serde_json::from_value(value)?;
                nodes
                    .create(&PostParams::default(), &node)
                    .await
                    .with_context(|| format!("can't make node {number}"))?;
                anyhow::Ok(())
            }
        };
        stream::iter((1..=count).map(make)).buffer_unordered(AT_ONCE).try_collect::<()>().await
    })
}

/// The images of Calico's stock manifest, by the names that kubelets report.
fn calico_images(bed: &Bed) -> Result<Vec<String>> {
    let mut images = BTreeSet::new();
    for object in documents(&bed.parts.manifest("calico", "calico.yaml")?)? {
        for list in ["/spec/template/spec/containers", "/spec/template/spec/initContainers"] {
            let containers = object.pointer(list).and_then(Value::as_array).into_iter().flatten();
            images.extend(
                containers.filter_map(|container| container.get("image")?.as_str().map(str::to_owned)),
            );
        }
    }
    let full =
        |image: String| if image.starts_with("docker.io/") { image } else { format!("docker.io/{image}") };
    Ok(images.into_iter().map(full).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_of_five_thousand_nodes_share_an_address_or_a_network() {
        let of = |number| node(number, &[]);
        let mut seen = BTreeSet::new();
        for number in 1..=5000 {
            let node = of(number);
            for pointer in ["/spec/podCIDR", "/status/addresses/0/address", "/metadata/name"] {
                assert!(seen.insert(node.pointer(pointer).unwrap().to_string()), "{pointer} of {number}");
            }
        }
        assert_eq!(number(&name(4711)), Some(4711));
        assert_eq!(pod_address(5, 3).to_string(), "10.0.1.67");
    }
}
