//! flannel from its stock manifest, in every shape that the test bed knows.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::layout::POD_CIDR_V6;
use crate::{
    parts::Parts,
    shape::{Layout, Rules, Shape},
};

/// The manifest's objects, as flannel's or Canal's users would apply them for this shape.
pub fn manifest(parts: &Parts, shape: &Shape) -> Result<Vec<Value>> {
    match shape.layout {
        Layout::Current => flannel(parts, shape),
        Layout::Older => Ok(older(flannel(parts, shape)?)),
        Layout::Canal => canal(&parts.manifest("calico", "canal.yaml")?, shape),
        Layout::Calico => calico(&parts.manifest("calico", "calico-vxlan.yaml")?, shape),
    }
}

/// Namespace and name of the DaemonSet.
#[must_use]
pub fn daemonset(shape: &Shape) -> (&'static str, &'static str) {
    match shape.layout {
        Layout::Current => ("kube-flannel", "kube-flannel-ds"),
        Layout::Older => ("kube-system", "kube-flannel-ds-amd64"),
        Layout::Canal => ("kube-system", "canal"),
        Layout::Calico => ("kube-system", "calico-node"),
    }
}

/// The objects of a manifest of several documents.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("the manifest is no YAML")?;
    Ok(documents.into_iter().filter(Value::is_object).collect())
}

fn flannel(parts: &Parts, shape: &Shape) -> Result<Vec<Value>> {
    let mut objects = documents(&parts.manifest("flannel", "kube-flannel.yml")?)?;
    let config = find(&mut objects, "ConfigMap")?;
    if !shape.versions.plugin_of_today() {
        edit_json(config, "/data/cni-conf.json", |cni| {
            // The only flannel plugin that the Go module proxy serves speaks up to 0.4.0; until v0.28.9 flannel's
            // manifests said 0.3.1.
            cni.insert("cniVersion".to_owned(), json!("0.3.1"));
        })?;
    }
    edit_json(config, "/data/net-conf.json", |net| network(net, shape))?;
    if shape.rules == Rules::Legacy {
        let daemonset = find(&mut objects, "DaemonSet")?;
        let container = daemonset.pointer_mut("/spec/template/spec/containers/0/env").context("no env")?;
        let path = "/opt/legacy:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        container.as_array_mut().context("env is no list")?.push(json!({ "name": "PATH", "value": path }));
    }
    Ok(objects)
}

/// As flannel's manifests were until v0.18: in kube-system, one DaemonSet per architecture.
fn older(mut objects: Vec<Value>) -> Vec<Value> {
    objects.retain(|object| object["kind"] != "Namespace");
    for object in &mut objects {
        let kind = object.get("kind").cloned();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.entry("namespace").and_modify(|namespace| *namespace = json!("kube-system"));
            if kind == Some(json!("DaemonSet")) {
                metadata.insert("name".to_owned(), json!("kube-flannel-ds-amd64"));
            }
        }
        let subjects = object.get_mut("subjects").and_then(Value::as_array_mut);
        for subject in subjects.into_iter().flatten().filter_map(Value::as_object_mut) {
            subject.insert("namespace".to_owned(), json!("kube-system"));
        }
    }
    objects
}

fn canal(stock: &str, shape: &Shape) -> Result<Vec<Value>> {
    let mut objects = documents(stock)?;
    let config = find(&mut objects, "ConfigMap")?;
    edit_json(config, "/data/net-conf.json", |net| network(net, shape))?;
    Ok(objects)
}

/// Calico alone, with the pod network, VXLAN network and port of this shape: what is compared with it then differs by its
/// history only.
fn calico(stock: &str, shape: &Shape) -> Result<Vec<Value>> {
    let mut objects = documents(stock)?;
    let daemonset = find(&mut objects, "DaemonSet")?;
    let env = daemonset.pointer_mut("/spec/template/spec/containers/0/env").and_then(Value::as_array_mut);
    let env = env.context("no env")?;
    for (name, value) in [
        ("CALICO_IPV4POOL_CIDR", shape.pod_cidr.to_string()),
        ("CALICO_IPV4POOL_VXLAN", "Always".to_owned()),
        ("FELIX_VXLANVNI", shape.vni.to_string()),
        ("FELIX_VXLANPORT", shape.port.to_string()),
    ] {
        env.retain(|variable| variable["name"] != name);
        env.push(json!({ "name": name, "value": value }));
    }
    Ok(objects)
}

/// Calico's manifest for the migration with IPv6 switched on, as its users would for flannel with both families.
pub fn calico_with_ipv6(stock: &str) -> Result<Vec<Value>> {
    let mut objects = documents(stock)?;
    let config =
        objects.iter_mut().find(|object| object.pointer("/metadata/name") == Some(&json!("calico-config")));
    let text =
        config.and_then(|config| config.pointer_mut("/data/cni_network_config")).context("no CNI config")?;
    let plain = r#""type": "calico-ipam""#;
    let both = format!(r#"{plain}, "assign_ipv4": "true", "assign_ipv6": "true""#);
    *text = json!(text.as_str().context("the CNI config is no text")?.replace(plain, &both));
    let daemonset = find(&mut objects, "DaemonSet")?;
    let env = daemonset.pointer_mut("/spec/template/spec/containers/0/env").and_then(Value::as_array_mut);
    let env = env.context("no env")?;
    for (name, value) in [("FELIX_IPV6SUPPORT", "true"), ("IP6", "autodetect")] {
        env.retain(|variable| variable["name"] != name);
        env.push(json!({ "name": name, "value": value }));
    }
    Ok(objects)
}

fn network(net: &mut Map<String, Value>, shape: &Shape) {
    net.insert("Network".to_owned(), json!(shape.pod_cidr));
    if shape.rules == Rules::Nftables {
        net.insert("EnableNFTables".to_owned(), json!(true));
    }
    if shape.dual_stack {
        net.insert("EnableIPv6".to_owned(), json!(true));
        net.insert("IPv6Network".to_owned(), json!(POD_CIDR_V6));
    }
    if let Some(backend) = net.get_mut("Backend").and_then(Value::as_object_mut) {
        if shape.vni != 1 {
            backend.insert("VNI".to_owned(), json!(shape.vni));
        }
        if shape.port != 8472 {
            backend.insert("Port".to_owned(), json!(shape.port));
        }
    }
}

fn find<'a>(objects: &'a mut [Value], kind: &str) -> Result<&'a mut Value> {
    objects
        .iter_mut()
        .find(|object| object["kind"] == kind)
        .with_context(|| format!("the manifest has no {kind}"))
}

/// Changes the JSON text at `pointer`.
fn edit_json(object: &mut Value, pointer: &str, change: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    // Keys with dots and no slashes: a JSON pointer takes them as they are.
    let Some(Value::String(text)) = object.pointer_mut(pointer) else {
        bail!("the ConfigMap has no {pointer}")
    };
    let mut value: Map<String, Value> =
        serde_json::from_str(text).with_context(|| format!("{pointer} is no JSON object"))?;
    change(&mut value);
    *text = serde_json::to_string_pretty(&value)?;
    Ok(())
}
