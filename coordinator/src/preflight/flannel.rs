//! What is wrong with flannel.

use super::Finding;
use crate::discover::{FlannelDaemon, NetConf};
use crate::origin::Version;

/// The first version whose devices and rules are those that are taken over.
const OLDEST: Version = Version(0, 9, 1);
/// Calico's in the first Canal with that flannel.
const OLDEST_CANAL: Version = Version(3, 7, 0);

/// Its configuration, as far as it could be read.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    /// What it says.
    pub conf: Option<&'a NetConf>,
    /// Why it can't be understood.
    pub error: Option<&'a str>,
    /// Whether the API server doesn't let it be read.
    pub forbidden: bool,
}

/// About the DaemonSet. `addon`: an addon manager keeps it.
pub fn daemon(flannel: &FlannelDaemon, addon: bool, findings: &mut Vec<Finding>) {
    let object = format!("DaemonSet {}", flannel.daemon_set);
    if let Some(version) = flannel.version.filter(|version| *version < OLDEST) {
        findings.push(Finding::fatal(
            "FlannelTooOld",
            &object,
            format!("flannel's version is {version}"),
            format!("Update flannel to {OLDEST} or later first"),
        ));
    }
    if let Some(version) = flannel.canal_version.filter(|version| *version < OLDEST_CANAL) {
        findings.push(Finding::fatal(
            "CanalTooOld",
            &object,
            format!("Canal's version is {version}"),
            format!("Update Canal to {OLDEST_CANAL} or later first"),
        ));
    }
    if !flannel.kube_subnet_manager {
        findings.push(Finding::fatal(
            "SubnetsInEtcd",
            &object,
            "flannel keeps its subnets in etcd (no --kube-subnet-mgr)",
            "Only flannel with --kube-subnet-mgr can be migrated",
        ));
    }
    if addon {
        findings.push(Finding::fatal(
            "AddonManaged",
            &object,
            "an addon manager would undo changes to it (label addonmanager.kubernetes.io/mode)",
            "Take it from the addon manager, then remove the label",
        ));
    }
    managed(&object, flannel.keeper.as_ref(), findings);
}

/// Somebody else's object that the migration changes.
pub fn managed(object: &str, keeper: Option<&String>, findings: &mut Vec<Finding>) {
    if let Some(keeper) = keeper {
        findings.push(Finding::warning(
            "ManagedElsewhere",
            object,
            format!("{keeper} manages it, and would undo changes to it"),
            "Suspend that for the time of the migration, and take flannel out of it afterwards",
        ));
    }
}

/// About its configuration.
pub fn config(flannel: &FlannelDaemon, config: Config<'_>, findings: &mut Vec<Finding>) {
    let object = flannel.config_object();
    if config.forbidden {
        let (namespace, secret) =
            (&flannel.daemon_set.namespace, flannel.config_secret.as_deref().unwrap_or_default());
        let account = "flannel-migration-config";
        findings.push(Finding::blocking(
            "FlannelConfigForbidden",
            &object,
            "flannel's configuration is in a Secret, and no right to read Secrets is granted",
            format!(
                "Grant this one: kubectl -n {namespace} create role {account} --verb=get --resource=secrets --resource-name={secret}; \
                 kubectl -n {namespace} create rolebinding {account} --role={account} \
                 --serviceaccount=kube-system:flannel-migration-controller --serviceaccount=kube-system:flannel-migration-preflight"
            ),
        ));
    }
    if let Some(error) = config.error {
        findings.push(Finding::fatal(
            "FlannelConfigUnreadable",
            &object,
            format!("{}: {error}", flannel.config_key),
            format!("Correct {}", flannel.config_key),
        ));
    }
    let Some(conf) = config.conf else { return };
    let kind = conf.backend.kind.as_deref().unwrap_or("udp");
    if !kind.eq_ignore_ascii_case("vxlan") {
        findings.push(Finding::fatal(
            "BackendNotVxlan",
            &object,
            format!("flannel's backend is {kind}"),
            "Only flannel's vxlan backend can be migrated: change the backend and restart flannel's pods first",
        ));
    }
    if conf.backend.direct_routing {
        findings.push(Finding::fatal(
            "DirectRouting",
            &object,
            "flannel's DirectRouting is on: packets between neighbours come without VXLAN, and a migrated node drops them (rp_filter)",
            "Set DirectRouting to false in net-conf.json and restart flannel's pods",
        ));
    }
    let only = conf.enable_ipv4 == Some(false);
    if only || flannel.canal && conf.carries_ipv6() {
        let what = if only { "flannel carries IPv6 only" } else { "Canal carries IPv6" };
        findings.push(Finding::fatal(
            "Ipv6Unsupported",
            &object,
            what,
            "Clusters with IPv4, or with IPv4 and IPv6 by flannel alone, can be migrated by this version",
        ));
    }
}
