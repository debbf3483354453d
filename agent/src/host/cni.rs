//! CNI configs of the node, and libcni's record of each sandbox's attachment.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use flannel_migration_protocol::Grant;
use flannel_migration_protocol::template::{self, Filling};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::host::files;

/// Where libcni records each attachment.
pub const RESULTS: &str = "/var/lib/cni/results";

/// A config or record that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("CNI files")]
    File(#[from] files::Error),
    /// Calico's template holds placeholders that nobody fills.
    #[error("Calico's CNI config template has unknown placeholders: {0}")]
    Placeholders(String),
    /// What Calico's template yields isn't JSON.
    #[error("Calico's CNI config template doesn't yield JSON: {0}")]
    Json(#[source] serde_json::Error),
}

/// A network config that a runtime would load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Its file.
    pub path: PathBuf,
    /// Permission bits of the file.
    pub mode: u32,
    /// The whole text.
    pub text: String,
    /// Name of the network.
    pub network: String,
    /// Types of its plugins, in order.
    pub plugins: Vec<String>,
}

impl Config {
    /// Whether this is flannel's, or Canal's.
    #[must_use]
    pub fn is_flannels(&self) -> bool {
        self.plugins.iter().any(|plugin| plugin == "flannel") || self.is_canals()
    }

    /// Whether Calico's plugin makes the link, and no other gives the address but its own.
    #[must_use]
    pub fn is_calicos(&self) -> bool {
        self.plugins.first().is_some_and(|plugin| plugin == "calico") && !self.is_canals()
    }

    /// Whether it is neither Calico's nor flannel's. A file without plugins isn't anybody's yet: Calico's installer doesn't write its config
    /// in one go.
    #[must_use]
    pub fn is_anothers(&self) -> bool {
        !self.plugins.is_empty() && !self.is_flannels() && !self.is_calicos()
    }

    /// Whether this is Canal's: Calico's plugin for the link, host-local for the address.
    fn is_canals(&self) -> bool {
        let value: Value = serde_json::from_str(&self.text).unwrap_or_default();
        let plugins = value.get("plugins").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        plugins.iter().any(|plugin| {
            plugin.get("type").is_some_and(|kind| kind == "calico")
                && plugin.pointer("/ipam/type").is_some_and(|kind| kind == "host-local")
        })
    }
}

/// All configs in a directory that a runtime would load, in the order in which it would prefer them. A file that isn't JSON has
/// neither network nor plugins.
pub fn configs(directory: &Path) -> Result<Vec<Config>, Error> {
    let mut configs = Vec::new();
    for name in files::names(directory)? {
        let path = directory.join(&name);
        let loaded = path.extension().is_some_and(|end| end == "conf" || end == "conflist" || end == "json");
        if !loaded || name.starts_with('.') {
            continue;
        }
        let Some(text) = files::read(&path)? else { continue };
        let mode = files::mode(&path)?;
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let kind = |plugin: &Value| plugin.get("type").and_then(Value::as_str).map(str::to_owned);
        let plugins = match value.get("plugins").and_then(Value::as_array) {
            Some(plugins) => plugins.iter().filter_map(kind).collect(),
            None => kind(&value).into_iter().collect(),
        };
        let network = value.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        configs.push(Config { path, mode, text, network, plugins });
    }
    Ok(configs)
}

/// Calico's config for this node, as Calico's own installer renders it (cni-plugin/pkg/install): with its defaults, where Calico's
/// manifest sets nothing else.
pub fn render(grant: &Grant, node: &str) -> Result<String, Error> {
    let directory = grant.flannel.cni_conf_dir.trim_end_matches('/');
    let (host, port) = grant.calico.kube_service_address.rsplit_once(':').unwrap_or_default();
    let text = template::fill(&grant.calico.cni_conf_template, |placeholder| {
        Some(match placeholder.filling {
            Filling::Text(text) => text.to_owned(),
            Filling::NodeName => node.to_owned(),
            Filling::Kubeconfig => format!("{directory}/calico-kubeconfig"),
            Filling::Mtu => grant.calico.mtu.to_string(),
            Filling::ServiceHost => host.trim_matches(['[', ']']).to_owned(),
            Filling::ServicePort => port.to_owned(),
        })
    });
    let left = template::unknown(&text);
    if !left.is_empty() {
        return Err(Error::Placeholders(left.join(", ")));
    }
    serde_json::from_str::<Value>(&text).map_err(Error::Json)?;
    Ok(text)
}

/// One sandbox's attachment to a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's sandbox id.
    pub sandbox: String,
    /// Name of the network.
    pub network: String,
    /// Interface inside the sandbox.
    pub interface: String,
    /// Path of the sandbox's network namespace, as the runtime wrote it.
    pub netns: String,
    /// The pod, as the runtime told the plugins.
    pub namespace: String,
    /// See `namespace`.
    pub pod: String,
    /// UID of the pod; empty when the runtime didn't tell.
    pub uid: String,
    /// Host end of the pod's link.
    pub veth: String,
    /// Addresses with their prefixes.
    pub addresses: Vec<IpNet>,
    /// Gateways, one of each family.
    pub gateways: Vec<IpAddr>,
    /// Whether ports of the host lead to the pod.
    pub host_ports: bool,
    /// Whether the bandwidth plugin shapes the pod's traffic.
    pub shaped: bool,
}

/// All attachments that libcni has on record.
pub fn attachments(directory: &Path) -> Result<Vec<Attachment>, Error> {
    let mut found = Vec::new();
    for name in files::names(directory)? {
        if let Some(text) = files::read(&directory.join(&name))?
            && let Some(attachment) = attachment(&text)
        {
            found.push(attachment);
        }
    }
    share_namespaces(&mut found);
    Ok(found)
}

// Calico's plugin doesn't say which namespace a link leads to; the loopback's record of the same sandbox does.
fn share_namespaces(attachments: &mut [Attachment]) {
    let known: BTreeMap<String, String> = attachments
        .iter()
        .filter(|attachment| !attachment.netns.is_empty())
        .map(|attachment| (attachment.sandbox.clone(), attachment.netns.clone()))
        .collect();
    for attachment in attachments.iter_mut().filter(|attachment| attachment.netns.is_empty()) {
        attachment.netns = known.get(&attachment.sandbox).cloned().unwrap_or_default();
    }
}

/// Reads one of libcni's records; `None` when it is none.
#[must_use]
pub fn attachment(text: &str) -> Option<Attachment> {
    let value: Value = serde_json::from_str(text).ok()?;
    let string =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let argument = |name: &str| {
        let pairs = value.get("cniArgs").and_then(Value::as_array)?;
        pairs.iter().find(|pair| pair.get(0).and_then(Value::as_str) == Some(name))?.get(1)?.as_str()
    };
    let capability = |name: &str| value.get("capabilityArgs").and_then(|arguments| arguments.get(name));
    let none = Value::Null;
    let result = value.get("result").unwrap_or(&none);
    let list = |key: &str| result.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let interfaces = list("interfaces");
    let inside = interfaces.iter().find(|interface| !string(interface, "sandbox").is_empty());
    let veth = interfaces
        .iter()
        .map(|interface| (string(interface, "name"), string(interface, "sandbox")))
        .find(|(name, sandbox)| sandbox.is_empty() && name.starts_with("veth"));
    let ips = list("ips");
    Some(Attachment {
        sandbox: string(&value, "containerId"),
        network: string(&value, "networkName"),
        interface: string(&value, "ifName"),
        netns: inside.map_or_else(|| string(&value, "netns"), |interface| string(interface, "sandbox")),
        namespace: argument("K8S_POD_NAMESPACE").unwrap_or_default().to_owned(),
        pod: argument("K8S_POD_NAME").unwrap_or_default().to_owned(),
        uid: argument("K8S_POD_UID").unwrap_or_default().to_owned(),
        veth: veth.map(|(name, _)| name).unwrap_or_default(),
        addresses: ips.iter().filter_map(|ip| string(ip, "address").parse().ok()).collect(),
        gateways: ips.iter().filter_map(|ip| string(ip, "gateway").parse().ok()).collect(),
        host_ports: capability("portMappings")
            .and_then(Value::as_array)
            .is_some_and(|ports| !ports.is_empty()),
        shaped: capability("bandwidth").and_then(Value::as_object).is_some_and(|limits| {
            limits.values().any(|limit| limit.as_f64().is_some_and(|limit| limit > 0.0))
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(template: &str) -> Grant {
        serde_json::from_value(serde_json::json!({
            "epoch": 1, "fence": 1, "goal": "migrate", "strategy": "in-place", "budgetSeconds": 120,
            "flannel": {"networks": ["10.244.0.0/16"], "vni": 1, "port": 8472, "mtu": 1450, "cniConfDir": "/etc/cni/net.d"},
            "calico": {"cniConfName": "10-calico.conflist", "cniConfTemplate": template, "mtu": 1450,
                       "healthPort": 9099, "kubeServiceAddress": "10.96.0.1:443"},
        }))
        .unwrap()
    }

    #[test]
    fn calicos_config_is_rendered_as_its_installer_does() {
        let template =
            r#"{"nodename": "__KUBERNETES_NODE_NAME__", "mtu": __CNI_MTU__, "k": "__KUBECONFIG_FILEPATH__"}"#;
        let text = render(&grant(template), "n2").unwrap();
        assert_eq!(text, r#"{"nodename": "n2", "mtu": 1450, "k": "/etc/cni/net.d/calico-kubeconfig"}"#);
    }

    /// The config that Calico 3.32's installer has of its own uses them.
    #[test]
    fn what_only_newer_installers_know_gets_their_defaults() {
        let template =
            r#"{"require_mtu_file": __REQUIRE_MTU_FILE__, "calico_api_group": "__CALICO_API_GROUP__"}"#;
        let text = render(&grant(template), "n2").unwrap();
        assert_eq!(text, r#"{"require_mtu_file": false, "calico_api_group": "crd.projectcalico.org/v1"}"#);
    }

    #[test]
    fn a_placeholder_nobody_fills_or_bad_json_is_refused() {
        for unknown in ["__SOMETHING_NEW__", "__IPV6_2__", "__SERVICEACCOUNT_TOKEN__"] {
            let error = render(&grant(&format!(r#"{{"a": "{unknown}"}}"#)), "n").unwrap_err();
            assert!(error.to_string().contains(unknown), "{error}");
        }
        assert!(matches!(render(&grant("{"), "n"), Err(Error::Json(_))));
    }

    #[test]
    fn a_record_of_libcni_is_read() {
        let text = r#"{"kind":"cniCacheV1","containerId":"abc","config":"e30=","ifName":"eth0","networkName":"cbr0",
            "cniArgs":[["IgnoreUnknown","1"],["K8S_POD_NAMESPACE","default"],["K8S_POD_NAME","web-0"],["K8S_POD_UID","u-1"]],
            "capabilityArgs":{"portMappings":[{"hostPort":80,"containerPort":80,"protocol":"tcp"}],"bandwidth":{"ingressRate":0}},
            "result":{"cniVersion":"0.3.1","interfaces":[{"name":"cni0","mac":"aa:aa:aa:aa:aa:aa"},{"name":"veth12345678","mac":"bb:bb:bb:bb:bb:bb"},
            {"name":"eth0","mac":"cc:cc:cc:cc:cc:cc","sandbox":"/var/run/netns/cni-1"}],
            "ips":[{"version":"4","interface":2,"address":"10.244.1.5/24","gateway":"10.244.1.1"}]}}"#;
        let found = attachment(text).unwrap();
        assert_eq!(
            (found.sandbox.as_str(), found.network.as_str(), found.interface.as_str()),
            ("abc", "cbr0", "eth0")
        );
        assert_eq!(
            (found.namespace.as_str(), found.pod.as_str(), found.uid.as_str()),
            ("default", "web-0", "u-1")
        );
        assert_eq!((found.netns.as_str(), found.veth.as_str()), ("/var/run/netns/cni-1", "veth12345678"));
        assert_eq!(found.addresses, ["10.244.1.5/24".parse::<IpNet>().unwrap()]);
        assert!(found.host_ports && !found.shaped);
        assert_eq!(attachment("no JSON"), None);
    }

    #[test]
    fn calicos_records_get_their_namespace_from_the_loopbacks() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put(
            "cni-loopback-abc-lo",
            r#"{"containerId":"abc","networkName":"cni-loopback","ifName":"lo",
                "result":{"interfaces":[{"name":"lo","sandbox":"/var/run/netns/cni-7"}]}}"#,
        );
        put(
            "k8s-pod-network-abc-eth0",
            r#"{"containerId":"abc","networkName":"k8s-pod-network","ifName":"eth0",
                "result":{"interfaces":[{"name":"cali0123456789a"}],"ips":[{"version":"4","address":"10.244.1.5/32"}]}}"#,
        );
        let found = attachments(directory.path()).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|attachment| attachment.netns == "/var/run/netns/cni-7"), "{found:?}");
    }

    #[test]
    fn configs_come_in_the_order_in_which_a_runtime_prefers_them() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put(
            "15-canal.conflist",
            r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"host-local","subnet":"usePodCidr"}}]}"#,
        );
        put(
            "16-calico.conflist",
            r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}}]}"#,
        );
        put("20-x.conf", r#"{"name":"x","type":"bridge"}"#);
        put("10-flannel.conflist", r#"{"name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#);
        put("30-half-written.conflist", r#"{"name":"k8s-pod-net"#);
        put("10-calico.conflist.bak", "{}");
        put("calico-kubeconfig", "x");
        let configs = configs(directory.path()).unwrap();
        let names: Vec<_> = configs.iter().map(|config| config.network.as_str()).collect();
        assert_eq!(names, ["cbr0", "k8s-pod-network", "k8s-pod-network", "x", ""]);
        let flannels: Vec<_> = configs.iter().map(Config::is_flannels).collect();
        assert_eq!(flannels, [true, true, false, false, false], "flannel's and Canal's");
        let calicos: Vec<_> = configs.iter().map(Config::is_calicos).collect();
        assert_eq!(calicos, [false, false, true, false, false]);
        let anothers: Vec<_> = configs.iter().map(Config::is_anothers).collect();
        assert_eq!(anothers, [false, false, false, true, false], "who knows whose the last one will be");
    }
}
