//! What holds for the cluster: what was detected, unless the administrator said it; and what he said must not contradict what was
//! detected. Pure.

use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

use flannel_migration_protocol::{CalicoFacts, FlannelFacts};
use ipnet::IpNet;

use crate::args::Stated;
use crate::calico::family::Family;
use crate::calico::layout::Layout;
use crate::cluster::NodeFacts;
use crate::discover::{CalicoDaemon, FlannelDaemon, Name, NetConf, VXLAN_PORT, VXLAN_VNI};
use crate::preflight::Finding;

/// What was read from the cluster.
#[derive(Clone, Debug)]
pub struct Detected {
    /// All DaemonSets that run flannel.
    pub flannel: Vec<FlannelDaemon>,
    /// flannel's configuration; none when there is no flannel, or not exactly one.
    pub net_conf: Option<NetConf>,
    /// All DaemonSets that run Calico.
    pub calico: Vec<Result<CalicoDaemon, Finding>>,
    /// Calico's CNI config template, filled in as far as it is the same on every node.
    pub template: Option<String>,
    /// The MTU of flannel's device and where it was seen.
    pub mtu: Option<(u32, String)>,
    /// Prefix lengths of the nodes' pod networks.
    pub subnet_lens: Vec<u8>,
    /// Cluster address and port of the Service `default/kubernetes`.
    pub kube_service_address: Option<String>,
}

/// What holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// flannel's DaemonSet.
    pub flannel: FlannelDaemon,
    /// Calico's DaemonSet.
    pub calico: CalicoDaemon,
    /// flannel, as the agents need it.
    pub flannel_facts: FlannelFacts,
    /// Calico, as the agents need it.
    pub calico_facts: CalicoFacts,
    /// Whether traffic that leaves the cluster is masqueraded.
    pub ip_masq: bool,
}

impl Settings {
    /// flannel's networks, IPv4 first.
    #[must_use]
    pub fn networks(&self) -> &[IpNet] {
        &self.flannel_facts.networks
    }

    /// Whether flannel carries IPv6 beside IPv4.
    #[must_use]
    pub fn dual_stack(&self) -> bool {
        self.networks().iter().any(|network| Family::of_net(network) == Family::V6)
    }

    /// How flannel's networks are divided among these nodes.
    #[must_use]
    pub fn layout(&self, nodes: &[Arc<NodeFacts>]) -> Layout {
        Layout::new(self.networks(), nodes.iter().flat_map(|node| &node.pod_cidrs))
    }
}

/// Collects contradictions, so that all are told at once.
struct Reconciled<'a> {
    findings: &'a mut Vec<Finding>,
}

impl Reconciled<'_> {
    /// The detected value, or the stated one if nothing was detected. `source` is the environment variable.
    fn value<T>(
        &mut self,
        source: &str,
        stated: Option<&String>,
        detected: Option<T>,
        whence: &str,
    ) -> Option<T>
    where
        T: FromStr + PartialEq + Display,
        T::Err: Display,
    {
        let Some(text) = stated.filter(|text| !text.is_empty()) else { return detected };
        let seen = detected.as_ref().map_or_else(
            || format!("nothing was detected in {whence}"),
            |value| format!("detected is {value} ({whence})"),
        );
        let remedy = format!("Unset {source} to use what is detected, or correct it");
        match (text.parse::<T>(), detected) {
            (Err(error), _) => {
                self.findings.push(Finding::fatal(
                    "SettingUnreadable",
                    source,
                    format!("{text:?} can't be read ({error}); {seen}"),
                    remedy,
                ));
                None
            }
            (Ok(stated), Some(detected)) if stated != detected => {
                self.findings.push(Finding::fatal(
                    "SettingContradictsCluster",
                    source,
                    format!("{text:?} is stated, but {seen}"),
                    remedy,
                ));
                None
            }
            (Ok(stated), _) => Some(stated),
        }
    }
}

/// Whether a name was stated that isn't this.
fn other(stated: Option<&String>, name: &str) -> bool {
    stated.is_some_and(|text| !text.is_empty() && text != name)
}

/// Picks the one DaemonSet that was meant. `Ok(None)`: there is none at all.
fn pick<'a, T>(
    what: &str,
    all: impl IntoIterator<Item = (&'a Name, T)>,
    stated: (&str, Option<&String>),
    stated_namespace: (&str, Option<&String>),
) -> Result<Option<T>, Finding> {
    let all: Vec<_> = all.into_iter().collect();
    let seen = all.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>().join(", ");
    if all.is_empty() {
        return Ok(None);
    }
    let mut meant: Vec<_> = all
        .into_iter()
        .filter(|(name, _)| !other(stated.1, &name.name) && !other(stated_namespace.1, &name.namespace))
        .collect();
    let said =
        |(variable, text): (&str, Option<&String>)| format!("{variable}={}", text.map_or("", String::as_str));
    match meant.len() {
        1 => Ok(meant.pop().map(|(_, value)| value)),
        0 => Err(Finding::fatal(
            "SettingContradictsCluster",
            format!("{} {}", said(stated), said(stated_namespace)),
            format!("no DaemonSet of that name runs {what}; detected is {seen}"),
            format!("Unset {} and {} to use what is detected, or correct them", stated.0, stated_namespace.0),
        )),
        _ => Err(Finding::fatal(
            "Ambiguous",
            format!("DaemonSets {seen}"),
            format!("more than one runs {what}"),
            format!("Set {} and {} to the one to use", stated.0, stated_namespace.0),
        )),
    }
}

/// The flannel that is meant.
pub fn flannel<'a>(stated: &Stated, all: &'a [FlannelDaemon]) -> Result<Option<&'a FlannelDaemon>, Finding> {
    pick(
        "flannel",
        all.iter().map(|daemon| (&daemon.daemon_set, daemon)),
        ("FLANNEL_DAEMONSET_NAME", stated.flannel_daemonset_name.as_ref()),
        ("FLANNEL_DAEMONSET_NAMESPACE", stated.flannel_daemonset_namespace.as_ref()),
    )
}

/// The Calico that is meant.
pub fn calico<'a>(
    stated: &Stated,
    all: &'a [Result<CalicoDaemon, Finding>],
) -> Result<Option<&'a CalicoDaemon>, Finding> {
    let usable = all.iter().filter_map(|daemon| daemon.as_ref().ok());
    let picked = pick(
        "Calico",
        usable.map(|daemon| (&daemon.daemon_set, daemon)),
        ("CALICO_DAEMONSET_NAME", stated.calico_daemonset_name.as_ref()),
        ("CALICO_DAEMONSET_NAMESPACE", stated.calico_daemonset_namespace.as_ref()),
    )?;
    match picked {
        Some(daemon) => Ok(Some(daemon)),
        None => all.iter().find_map(|daemon| daemon.as_ref().err().cloned()).map_or(Ok(None), Err),
    }
}

/// Everything that holds, or everything that is wrong.
#[allow(clippy::too_many_lines, reason = "a list of values, each reconciled the same way")]
pub fn settle(stated: &Stated, detected: &Detected) -> Result<Settings, Vec<Finding>> {
    let mut findings = Vec::new();
    let keep = |result: Result<_, Finding>, findings: &mut Vec<Finding>| {
        result.unwrap_or_else(|finding| {
            findings.push(finding);
            None
        })
    };
    let flannel = keep(flannel(stated, &detected.flannel), &mut findings).cloned();
    let calico = match calico(stated, &detected.calico) {
        Ok(Some(calico)) => Some(calico.clone()),
        Ok(None) => {
            findings.push(Finding::blocking(
                "CalicoNotFound",
                "DaemonSet kube-system/calico-node",
                "no DaemonSet runs Calico",
                "Apply Calico's stock manifests/flannel-migration/calico.yaml",
            ));
            None
        }
        Err(finding) => {
            findings.push(finding);
            None
        }
    };
    let whence = flannel.as_ref().map_or_else(|| "no flannel".to_owned(), FlannelDaemon::config_object);
    let daemon_whence = flannel
        .as_ref()
        .map_or_else(|| "no flannel".to_owned(), |flannel| format!("DaemonSet {}", flannel.daemon_set));
    let conf = detected.net_conf.as_ref();
    let mut reconciled = Reconciled { findings: &mut findings };
    let network = reconciled.value(
        "FLANNEL_NETWORK",
        stated.flannel_network.as_ref(),
        conf.and_then(|conf| conf.network),
        &whence,
    );
    let network_v6 = conf.filter(|conf| conf.carries_ipv6()).and_then(|conf| conf.ipv6_network);
    let vni = conf.map(|conf| conf.backend.vni.unwrap_or(VXLAN_VNI));
    let vni = reconciled.value("FLANNEL_VNI", stated.flannel_vni.as_ref(), vni, &whence);
    let port = conf.map(|conf| conf.backend.port.filter(|port| *port != 0).unwrap_or(VXLAN_PORT));
    let port = reconciled.value("FLANNEL_PORT", stated.flannel_port.as_ref(), port, &whence);
    let mtu_whence = detected.mtu.as_ref().map_or("this node's interfaces", |(_, whence)| whence.as_str());
    let mtu = reconciled.value(
        "FLANNEL_MTU",
        stated.flannel_mtu.as_ref(),
        detected.mtu.as_ref().map(|(mtu, _)| *mtu),
        mtu_whence,
    );
    let masq = flannel.as_ref().map(|flannel| flannel.ip_masq);
    let ip_masq = reconciled.value("FLANNEL_IP_MASQ", stated.flannel_ip_masq.as_ref(), masq, &daemon_whence);
    let prefix = flannel.as_ref().map(|flannel| flannel.annotation_prefix.clone());
    reconciled.value(
        "FLANNEL_ANNOTATION_PREFIX",
        stated.flannel_annotation_prefix.as_ref(),
        prefix,
        &daemon_whence,
    );
    let dir = flannel.as_ref().map(|flannel| flannel.cni_conf_dir.clone());
    let cni_conf_dir =
        reconciled.value("CNI_CONFIG_DIR", stated.cni_config_dir.as_ref(), dir, &daemon_whence);
    let len = detected.subnet_lens.iter().copied().max();
    reconciled.value(
        "FLANNEL_SUBNET_LEN",
        stated.flannel_subnet_len.as_ref(),
        len,
        "the nodes' pod networks",
    );

    let undetected = |what: &str, object: &str, remedy: &str| {
        Finding::blocking("NotDetected", object, format!("{what} isn't known"), remedy)
    };
    if flannel.is_some() && mtu.is_none() && stated.flannel_mtu.as_ref().is_none_or(String::is_empty) {
        findings.push(undetected(
            "flannel's MTU",
            "FLANNEL_MTU",
            "Set FLANNEL_MTU to FLANNEL_MTU of /run/flannel/subnet.env on the nodes",
        ));
    }
    if flannel.is_some() && conf.is_none() {
        findings.push(undetected(
            "flannel's configuration",
            &whence,
            "See to it that it holds flannel's net-conf.json",
        ));
    }
    let stated_network = stated.flannel_network.as_ref().is_some_and(|text| !text.is_empty());
    if conf.is_some_and(|conf| conf.network.is_none()) && !stated_network {
        findings.push(undetected(
            "flannel's network",
            &whence,
            "Set FLANNEL_NETWORK, or Network in net-conf.json",
        ));
    }
    if conf.is_some_and(NetConf::carries_ipv6) && network_v6.is_none() {
        findings.push(undetected("flannel's IPv6 network", &whence, "Set IPv6Network in net-conf.json"));
    }
    if detected.kube_service_address.is_none() {
        findings.push(undetected(
            "the address of the API server's Service",
            "Service default/kubernetes",
            "The API server makes it: see to the API server",
        ));
    }
    if calico.is_some() && detected.template.is_none() {
        findings.push(undetected(
            "Calico's CNI config",
            "ConfigMap of Calico",
            "Apply Calico's stock manifest again",
        ));
    }
    let settled = || {
        let (flannel, calico) = (flannel?, calico?);
        let mtu = mtu?;
        Some(Settings {
            flannel_facts: FlannelFacts {
                networks: std::iter::once(network?).chain(network_v6).collect(),
                vni: vni?,
                port: port?,
                mtu,
                cni_conf_dir: cni_conf_dir?,
                canal: flannel.canal,
            },
            calico_facts: CalicoFacts {
                cni_conf_name: calico.cni_conf_name.clone(),
                cni_conf_template: detected.template.clone()?,
                mtu,
                health_port: calico.health_port,
                kube_service_address: detected.kube_service_address.clone()?,
            },
            ip_masq: ip_masq?,
            flannel,
            calico,
        })
    };
    match settled() {
        Some(settings) if findings.is_empty() => Ok(settings),
        _ => Err(findings),
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
pub(crate) mod tests;
