//! flannel and Calico, recognised by what they run, not by what they are called. Pure: from objects to facts.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use kube::ResourceExt as _;
use serde::Deserialize;
use serde_json::Value;

use crate::installer::Installer;
use crate::origin::{self, Version};
use crate::preflight::Finding;
use flannel_migration_protocol::keys;

/// A namespaced object's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name {
    /// Namespace.
    pub namespace: String,
    /// Name in it.
    pub name: String,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// flannel's DaemonSet, and where its configuration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlannelDaemon {
    /// The DaemonSet.
    pub daemon_set: Name,
    /// The ConfigMap with its configuration; empty when it is elsewhere.
    pub config_map: String,
    /// The Secret with its configuration, where it is in one (RKE2).
    pub config_secret: Option<String>,
    /// The key in it.
    pub config_key: String,
    /// Its service account.
    pub service_account: Option<String>,
    /// Whether it masquerades traffic that leaves the cluster.
    pub ip_masq: bool,
    /// Prefix of its annotations on nodes.
    pub annotation_prefix: String,
    /// Whether it stores its subnets in Kubernetes, not in etcd.
    pub kube_subnet_manager: bool,
    /// The directory with CNI configs on the host.
    pub cni_conf_dir: String,
    /// Whether Calico runs in the same pods (Canal).
    pub canal: bool,
    /// flannel's version, if its image's tag tells.
    pub version: Option<Version>,
    /// Of Canal, Calico's version, if its image's tag tells.
    pub canal_version: Option<Version>,
    /// Who would put the DaemonSet back.
    pub keeper: Option<String>,
}

impl FlannelDaemon {
    /// The object that holds its configuration, for people.
    #[must_use]
    pub fn config_object(&self) -> String {
        let namespace = &self.daemon_set.namespace;
        match &self.config_secret {
            Some(secret) => format!("Secret {namespace}/{secret}"),
            None => format!("ConfigMap {namespace}/{}", self.config_map),
        }
    }
}

/// flannel's `net-conf.json`; defaults as flannel has them. Read by [`net_conf`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NetConf {
    /// The pod network.
    #[serde(default)]
    pub network: Option<IpNet>,
    /// The IPv6 pod network.
    #[serde(rename = "ipv6network", default)]
    pub ipv6_network: Option<IpNet>,
    /// Whether IPv4 is on; absent: yes.
    #[serde(rename = "enableipv4", default)]
    pub enable_ipv4: Option<bool>,
    /// Whether IPv6 is on; absent: no.
    #[serde(rename = "enableipv6", default)]
    pub enable_ipv6: Option<bool>,
    /// How packets travel.
    #[serde(default)]
    pub backend: Backend,
}

/// flannel's backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Backend {
    /// vxlan, host-gw, ...; flannel's default is udp.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// VXLAN network identifier.
    #[serde(default)]
    pub vni: Option<u32>,
    /// UDP port; 0 or absent: the kernel's default.
    #[serde(default)]
    pub port: Option<u16>,
    /// MTU of the device.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Whether nodes of one segment talk without encapsulation.
    #[serde(rename = "directrouting", default)]
    pub direct_routing: bool,
}

impl NetConf {
    /// Whether flannel carries IPv6.
    #[must_use]
    pub fn carries_ipv6(&self) -> bool {
        self.enable_ipv6 == Some(true)
    }
}

/// Reads `net-conf.json`. flannel, as every program in Go, takes names in any case.
pub fn net_conf(text: &str) -> Result<NetConf, serde_json::Error> {
    match serde_json::from_str(text)? {
        Value::Object(fields) => serde_json::from_value(lower(Value::Object(fields))),
        _ => Err(serde::de::Error::custom("it is no JSON object")),
    }
}

fn lower(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (name.to_lowercase(), lower(value))).collect()
        }
        other => other,
    }
}

/// Calico's DaemonSet and what its installer writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalicoDaemon {
    /// The DaemonSet.
    pub daemon_set: Name,
    /// File name of its CNI config.
    pub cni_conf_name: String,
    /// The ConfigMap that holds the template and the MTU.
    pub config_map: String,
    /// The template's key in it.
    pub template_key: String,
    /// The MTU's key in it, if the MTU comes from there.
    pub mtu_key: Option<String>,
    /// What its installer is told.
    pub installer: Installer,
    /// The group of the definitions that it is told to keep its data in; it decides by itself without.
    pub api_group: Option<String>,
    /// All images of its pods, each once.
    pub images: Vec<String>,
    /// Felix's health port on the host's loopback.
    pub health_port: u16,
    /// Whether its pods wait for the migration label.
    pub waits: bool,
    /// Its version, if its image's tag tells.
    pub version: Option<Version>,
    /// Where it keeps its data, if the manifest says so: kubernetes or etcdv3.
    pub datastore: Option<String>,
    /// How it finds a node's address, when it does: `first-found` and others.
    pub autodetection: Option<String>,
    /// What of it is ready for IPv6.
    pub ipv6: Ipv6,
    /// Who would put the DaemonSet back.
    pub keeper: Option<String>,
}

/// What of Calico's DaemonSet is ready for IPv6.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ipv6 {
    /// Whether Felix knows IPv6; it does unless it is told not to.
    pub felix: bool,
    /// How it finds a node's IPv6 address, when it does; nothing is found unasked.
    pub autodetection: Option<String>,
}

/// flannel's annotation prefix unless it is told another.
pub const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";
/// Linux' VXLAN port, which flannel takes.
pub const VXLAN_PORT: u16 = 8472;
/// flannel's VXLAN network identifier unless it is told another.
pub const VXLAN_VNI: u32 = 1;
/// Calico's DaemonSet has a container of this name in all its manifests.
const CALICO_CONTAINER: &str = "calico-node";

fn pod_spec(daemon_set: &DaemonSet) -> PodSpec {
    daemon_set.spec.as_ref().and_then(|spec| spec.template.spec.clone()).unwrap_or_default()
}

fn name_of(daemon_set: &DaemonSet) -> Name {
    Name { namespace: daemon_set.namespace().unwrap_or_default(), name: daemon_set.name_any() }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The container that runs flanneld: by its command, or, without one, by its image's name.
fn flanneld(spec: &PodSpec) -> Option<&Container> {
    spec.containers.iter().find(|container| match container.command.as_deref().and_then(<[_]>::first) {
        Some(command) => base_name(command) == "flanneld",
        None => container.image.as_deref().is_some_and(|image| {
            base_name(image).split([':', '@']).next().is_some_and(|name| name == "flannel")
        }),
    })
}

fn flag(container: &Container, name: &str) -> Option<String> {
    let words = container.command.iter().flatten().chain(container.args.iter().flatten());
    let mut words = words.map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let Some(rest) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else { continue };
        if let Some(value) = rest.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) {
            return Some(value.to_owned());
        }
        if rest == name {
            return Some(
                words.peek().filter(|next| !next.starts_with('-')).map_or("true", |next| next).to_owned(),
            );
        }
    }
    let variable = format!("FLANNELD_{}", name.replace('-', "_").to_uppercase());
    env(container, &variable)
}

fn env(container: &Container, name: &str) -> Option<String> {
    container
        .env
        .iter()
        .flatten()
        .find(|variable| variable.name == name)
        .and_then(|variable| variable.value.clone())
}

fn is_on(value: Option<&String>) -> bool {
    value.is_some_and(|value| matches!(value.as_str(), "true" | "1" | "t" | "T" | "TRUE" | "True"))
}

/// As Felix reads it.
pub(crate) fn is_off(value: &str) -> bool {
    matches!(value.to_lowercase().as_str(), "false" | "0" | "no" | "n" | "f")
}

/// All DaemonSets that run flanneld.
#[must_use]
pub fn flannel_daemons(all: &[DaemonSet]) -> Vec<FlannelDaemon> {
    all.iter()
        .filter_map(|daemon_set| {
            let spec = pod_spec(daemon_set);
            let container = flanneld(&spec)?;
            let path = flag(container, "net-config-path")
                .unwrap_or_else(|| "/etc/kube-flannel/net-conf.json".to_owned());
            let (config_map, config_secret, config_key) = config(&spec, container, &path);
            let calico = spec.containers.iter().find(|container| container.name == CALICO_CONTAINER);
            Some(FlannelDaemon {
                daemon_set: name_of(daemon_set),
                config_map,
                config_secret,
                config_key,
                service_account: spec.service_account_name.clone(),
                ip_masq: is_on(flag(container, "ip-masq").as_ref()),
                annotation_prefix: flag(container, "kube-annotation-prefix")
                    .unwrap_or_else(|| ANNOTATION_PREFIX.to_owned()),
                kube_subnet_manager: is_on(flag(container, "kube-subnet-mgr").as_ref()),
                cni_conf_dir: cni_conf_dir(&spec),
                canal: calico.is_some(),
                version: version(container),
                canal_version: calico.and_then(version),
                keeper: origin::keeper(daemon_set),
            })
        })
        .collect()
}

fn version(container: &Container) -> Option<Version> {
    container.image.as_deref().and_then(origin::version_of)
}

/// ConfigMap or Secret that holds the file at `path`, and the file's key in it.
fn config(spec: &PodSpec, container: &Container, path: &str) -> (String, Option<String>, String) {
    let file = base_name(path);
    let mounts = container.volume_mounts.iter().flatten();
    let volumes = mounts
        .filter(|mount| path.starts_with(mount.mount_path.trim_end_matches('/')))
        .filter_map(|mount| spec.volumes.iter().flatten().find(|volume| volume.name == mount.name));
    for volume in volumes {
        let (name, secret, items) = match (&volume.config_map, &volume.secret) {
            (Some(map), _) => (map.name.clone(), None, &map.items),
            (None, Some(secret)) => (String::new(), secret.secret_name.clone(), &secret.items),
            (None, None) => continue,
        };
        // A key may be mounted under another name.
        let item = items.iter().flatten().find(|item| item.path == file);
        return (name, secret, item.map_or_else(|| file.to_owned(), |item| item.key.clone()));
    }
    (String::new(), None, file.to_owned())
}

/// The host's directory of CNI configs: the hostPath that ends like one.
fn cni_conf_dir(spec: &PodSpec) -> String {
    spec.volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.host_path.as_ref())
        .map(|host_path| host_path.path.trim_end_matches('/').to_owned())
        .find(|path| path.ends_with("net.d"))
        .unwrap_or_else(|| "/etc/cni/net.d".to_owned())
}

/// All DaemonSets that run Calico's node agent with its CNI installer, and no flanneld.
///
/// A DaemonSet that looks like it but can't be used comes as a finding.
#[must_use]
pub fn calico_daemons(all: &[DaemonSet]) -> Vec<Result<CalicoDaemon, Finding>> {
    all.iter()
        .filter_map(|daemon_set| {
            let spec = pod_spec(daemon_set);
            let node = spec.containers.iter().find(|container| container.name == CALICO_CONTAINER)?;
            flanneld(&spec).is_none().then(|| calico_daemon(daemon_set, &spec, node))
        })
        .collect()
}

fn calico_daemon(of: &DaemonSet, spec: &PodSpec, node: &Container) -> Result<CalicoDaemon, Finding> {
    let daemon_set = name_of(of);
    let unusable = |found: &str| {
        Finding::fatal(
            "CalicoManifestUnusable",
            format!("DaemonSet {daemon_set}"),
            found,
            "Apply Calico's stock manifests/flannel-migration/calico.yaml",
        )
    };
    let installers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let installer = installers
        .clone()
        .find(|container| container.name == "install-cni")
        .ok_or_else(|| unusable("it has no container install-cni"))?;
    let cni_conf_name = env(installer, "CNI_CONF_NAME")
        .ok_or_else(|| unusable("install-cni has no literal CNI_CONF_NAME"))?;
    let from_config_map = |variable: &str| {
        let source = installer.env.iter().flatten().find(|env| env.name == variable)?.value_from.clone()?;
        source.config_map_key_ref.map(|key| (key.name, key.key))
    };
    let (config_map, template_key) = from_config_map("CNI_NETWORK_CONFIG")
        .ok_or_else(|| unusable("install-cni takes no CNI_NETWORK_CONFIG from a ConfigMap"))?;
    let mut images: Vec<String> = installers.filter_map(|container| container.image.clone()).collect();
    images.sort();
    images.dedup();
    Ok(CalicoDaemon {
        installer: Installer::of(installer, &config_map),
        api_group: env(node, "CALICO_API_GROUP").filter(|group| !group.is_empty()),
        mtu_key: from_config_map("CNI_MTU").filter(|(map, _)| *map == config_map).map(|(_, key)| key),
        daemon_set,
        cni_conf_name,
        config_map,
        template_key,
        images,
        health_port: env(node, "FELIX_HEALTHPORT").and_then(|port| port.parse().ok()).unwrap_or(9099),
        waits: waits(spec.node_selector.as_ref()),
        version: version(node),
        datastore: env(node, "DATASTORE_TYPE"),
        autodetection: autodetection(node, "IP"),
        ipv6: Ipv6 {
            felix: env(node, "FELIX_IPV6SUPPORT").is_none_or(|value| !is_off(&value)),
            autodetection: autodetection(node, "IP6"),
        },
        keeper: origin::keeper(of),
    })
}

/// The method by which the address that `variable` is about is found, if it is.
fn autodetection(node: &Container, variable: &str) -> Option<String> {
    let method = || env(node, &format!("{variable}_AUTODETECTION_METHOD"));
    (env(node, variable).as_deref() == Some("autodetect"))
        .then(|| method().filter(|method| !method.is_empty()).unwrap_or_else(|| "first-found".to_owned()))
}

fn waits(selector: Option<&BTreeMap<String, String>>) -> bool {
    selector.is_some_and(|selector| selector.get(keys::NETWORK).is_some_and(|value| value == "calico"))
}

#[cfg(test)]
#[path = "discover_tests.rs"]
mod tests;
