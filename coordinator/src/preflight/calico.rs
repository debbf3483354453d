//! What is wrong with Calico, and with what it left or was given before.

use std::collections::BTreeMap;
use std::sync::Arc;

use flannel_migration_protocol::template::{self, Filling};
use ipnet::IpNet;
use serde_json::Value;

use super::{Finding, flannel};
use crate::calico::types::{FelixConfigurationSpec, IpPoolSpec};
use crate::calico::{names, prepare};
use crate::cluster::NodeFacts;
use crate::discover::CalicoDaemon;
use crate::origin::Version;
use crate::settings::Settings;

/// Where Calico's manifest is, for people.
const STOCK: &str = "Apply Calico's stock manifests/flannel-migration/calico.yaml";
/// How Calico gets to the group that a migration doesn't know.
const AFTERWARDS: &str = "After the migration, Calico's own DatastoreMigration takes its data to projectcalico.org (Calico 3.32 and later)";
/// The newer group of Calico's definitions with its version, as Calico is told it.
const NEWER_GROUP: &str = "projectcalico.org/v3";
/// Older ones release the blocks of nodes that still run flannel.
const OLDEST: Version = Version(3, 23, 0);

/// What is in Calico's datastore before the migration writes there.
#[derive(Clone, Debug, Default)]
pub struct Datastore {
    /// Whether `crd.projectcalico.org` is served.
    pub definitions: bool,
    /// Whether only the newer group `projectcalico.org` is.
    pub only_native: bool,
    /// The pools, by name.
    pub pools: Vec<(String, IpPoolSpec)>,
    /// The blocks: network, and `host:<node>`.
    pub blocks: Vec<(IpNet, Option<String>)>,
    /// Felix's configuration.
    pub felix: Option<FelixConfigurationSpec>,
}

/// About its resource definitions.
pub fn definitions(datastore: &Datastore, findings: &mut Vec<Finding>) {
    if datastore.only_native {
        findings.push(Finding::fatal(
            "CalicoDatastoreGroup",
            "CustomResourceDefinition ippools.projectcalico.org",
            "only the group projectcalico.org is served: Calico from 3.32 on then keeps its data there, not in crd.projectcalico.org",
            format!(
                "A migration needs crd.projectcalico.org, which Calico takes as soon as it is there. {STOCK}: it brings these definitions, in \
                 3.32 and later too. Before that, delete those of projectcalico.org, if they hold nothing that is needed; then restart calico-kube-controllers. \
                 {AFTERWARDS}"
            ),
        ));
    } else if !datastore.definitions {
        findings.push(Finding::blocking(
            "CalicoDefinitionsMissing",
            "CustomResourceDefinition ippools.crd.projectcalico.org",
            "Calico's resource definitions are missing",
            STOCK,
        ));
    }
}

/// About its DaemonSet. `pods`: how many of its pods are meant to run; `begun`: the migration has labelled nodes.
pub fn daemon(calico: &CalicoDaemon, template: Option<&str>, pods: i32, findings: &mut Vec<Finding>) {
    let object = format!("DaemonSet {}", calico.daemon_set);
    let selector = crate::survey::NETWORK_LABEL;
    if !calico.waits {
        findings.push(if pods > 0 {
            Finding::fatal(
                "CalicoRunsAlready",
                &object,
                format!(
                    "it has no nodeSelector {selector}=calico, and {pods} of its pods run next to flannel"
                ),
                format!("Give it the nodeSelector {selector}=calico, or: {STOCK}"),
            )
        } else {
            Finding::fatal(
                "CalicoDoesNotWait",
                &object,
                format!("it has no nodeSelector {selector}=calico, so that it runs next to flannel"),
                format!("Give it the nodeSelector {selector}=calico, or: {STOCK}"),
            )
        });
    }
    if let Some(version) = calico.version.filter(|version| *version < OLDEST) {
        findings.push(Finding::fatal(
            "CalicoTooOld",
            &object,
            format!("Calico's version is {version}; before {OLDEST} it gives away the blocks of nodes that flannel still runs"),
            format!("Apply manifests/flannel-migration/calico.yaml of Calico {OLDEST} or later"),
        ));
    }
    if let Some(datastore) = calico.datastore.as_deref().filter(|datastore| *datastore != "kubernetes") {
        findings.push(Finding::fatal(
            "CalicoInEtcd",
            &object,
            format!("its DATASTORE_TYPE is {datastore}"),
            format!("Only Calico with the Kubernetes datastore can take over: {STOCK}"),
        ));
    }
    newer_group(calico, template, findings);
    if let Some(why) = template.and_then(|template| unusable(calico, template)) {
        findings.push(Finding::fatal(
            "CalicoManifestUnusable",
            format!("ConfigMap {}/{}", calico.daemon_set.namespace, calico.config_map),
            format!("{}: {why}", calico.template_key),
            STOCK,
        ));
    }
    flannel::managed(&object, calico.keeper.as_ref(), findings);
}

/// Whether Calico, or its CNI plugin, is told to keep its data in the newer group, whatever is served.
fn newer_group(calico: &CalicoDaemon, template: Option<&str>, findings: &mut Vec<Finding>) {
    let newer = |group: &str| group.eq_ignore_ascii_case(NEWER_GROUP);
    let plugin = || {
        let config = completed(template?).ok()?;
        Some(plugins(&config).first()?.get("calico_api_group")?.as_str()?.to_owned())
    };
    let (object, what) = if calico.api_group.as_deref().is_some_and(newer) {
        (format!("DaemonSet {}", calico.daemon_set), "CALICO_API_GROUP in container calico-node")
    } else if plugin().as_deref().is_some_and(newer) {
        let object = format!("ConfigMap {}/{}", calico.daemon_set.namespace, calico.config_map);
        (object, "calico_api_group in Calico's CNI config")
    } else {
        return;
    };
    findings.push(Finding::fatal(
        "CalicoDatastoreGroup",
        object,
        format!("{what} is {NEWER_GROUP}, so that Calico keeps its data in projectcalico.org, not in crd.projectcalico.org"),
        format!(
            "Take CALICO_API_GROUP out of Calico's DaemonSet and calico_api_group out of its CNI config: it then uses \
             crd.projectcalico.org, which a migration needs and which Calico's stock manifests bring. {AFTERWARDS}"
        ),
    ));
}

/// The template as its installer would complete it, as far as its structure goes.
fn completed(template: &str) -> Result<Value, String> {
    let text = template::fill(template, |placeholder| {
        Some(match placeholder.filling {
            Filling::Text(text) => text.to_owned(),
            // The rest is inside of strings or stands for a number: a number fits both.
            _ => "1".to_owned(),
        })
    });
    serde_json::from_str(&text).map_err(|error| format!("it is no JSON ({error})"))
}

fn plugins(config: &Value) -> Vec<&Value> {
    config
        .get("plugins")
        .and_then(Value::as_array)
        .map(|plugins| plugins.iter().collect())
        .unwrap_or_default()
}

fn type_of(plugin: &Value) -> Option<&str> {
    plugin.get("type").and_then(Value::as_str)
}

/// Why a CNI config template can't be used.
fn unusable(calico: &CalicoDaemon, template: &str) -> Option<String> {
    let unknown = template::unknown(template);
    if !unknown.is_empty() {
        return Some(format!("it has placeholders that agents can't fill in: {}", unknown.join(", ")));
    }
    let unreadable: Vec<String> = calico
        .installer
        .unreadable(template)
        .iter()
        .map(|(mark, variable)| format!("{mark} ({variable})"))
        .collect();
    if !unreadable.is_empty() {
        let unreadable = unreadable.join(", ");
        return Some(format!("variables of install-cni come from where they can't be read: {unreadable}"));
    }
    let config = match completed(template) {
        Ok(config) => config,
        Err(why) => return Some(why),
    };
    let plugins = plugins(&config);
    let first = plugins.first()?;
    if type_of(first) != Some("calico") {
        return Some(format!("its first plugin is {}, not calico", type_of(first).unwrap_or("unnamed")));
    }
    let ipam = first.get("ipam").and_then(type_of).unwrap_or("none");
    (ipam != "calico-ipam").then(|| format!("its IPAM is {ipam}, not calico-ipam"))
}

/// The plugins that a template names and the installer of this version of Calico doesn't bring.
#[must_use]
pub fn foreign_plugins(template: &str, version: Option<Version>) -> Vec<String> {
    const BROUGHT: [&str; 7] =
        ["calico", "calico-ipam", "flannel", "host-local", "loopback", "portmap", "tuning"];
    // Since then Calico limits bandwidth by itself.
    let bandwidth = version.is_none_or(|version| version < Version(3, 30, 0));
    let Ok(config) = completed(template) else { return Vec::new() };
    let brought = |name: &str| BROUGHT.contains(&name) || bandwidth && name == "bandwidth";
    plugins(&config)
        .into_iter()
        .flat_map(|plugin| [type_of(plugin), plugin.get("ipam").and_then(type_of)])
        .flatten()
        .filter(|name| !brought(name))
        .map(str::to_owned)
        .collect()
}

/// About what is in its datastore. `in_use`: some node is Calico's already.
pub fn contents(
    datastore: &Datastore,
    settings: &Settings,
    nodes: &[Arc<NodeFacts>],
    in_use: bool,
    findings: &mut Vec<Finding>,
) {
    if settings.dual_stack() {
        findings.extend(ipv6(settings, datastore));
    }
    let layout = settings.layout(nodes);
    let wanted = layout.pools(settings.ip_masq);
    // Canal's own pool gives out no addresses: it is made the one that is needed.
    let taken_over = |name: &str| settings.flannel.canal && !in_use && name == names::POOL;
    let pools = datastore.pools.iter().filter(|(name, _)| !taken_over(name));
    findings.extend(pools.flat_map(|(name, pool)| prepare::pool_finding(name, pool, &wanted)));
    // There are several blocks for each node.
    let blocks: BTreeMap<IpNet, Option<&str>> =
        datastore.blocks.iter().map(|(block, owner)| (block.trunc(), owner.as_deref())).collect();
    for node in nodes.iter().filter(|node| super::nodes::untouched(node)) {
        let own = format!("host:{}", node.name);
        for cidr in &node.pod_cidrs {
            let Some(block_size) = layout.block_size(cidr) else { continue };
            let foreign = overlapping(&blocks, cidr)
                .filter(|(block, owner)| *owner != Some(&own) || block.prefix_len() != block_size);
            findings.extend(foreign.map(|(block, owner)| foreign_block(node, block, owner)));
        }
    }
    let Some(felix) = &datastore.felix else { return };
    let object = "FelixConfiguration default";
    if felix.other.get("bpfEnabled") == Some(&Value::Bool(true)) {
        findings.push(Finding::fatal(
            "CalicoEbpf",
            object,
            "Calico's eBPF data plane is on (bpfEnabled); it doesn't go together with flannel's nodes",
            "Set bpfEnabled to false; it can be switched on after the migration",
        ));
    }
    if in_use {
        findings.extend(prepare::felix_finding(felix, settings));
    }
}

/// What Calico lacks to carry IPv6: its manifest for a migration has it switched off.
fn ipv6(settings: &Settings, datastore: &Datastore) -> Option<Finding> {
    let calico = &settings.calico;
    let felix = datastore.felix.as_ref().and_then(|felix| felix.other.get("ipv6Support"));
    let lacking: Vec<&str> = [
        (!calico.ipv6.felix, "FELIX_IPV6SUPPORT=true in container calico-node"),
        (felix == Some(&Value::Bool(false)), "ipv6Support: true in FelixConfiguration default"),
        (calico.ipv6.autodetection.is_none(), "IP6=autodetect in container calico-node"),
        (
            !assigns_ipv6(&settings.calico_facts.cni_conf_template),
            "\"assign_ipv4\": \"true\" and \"assign_ipv6\": \"true\" in the ipam of its CNI config",
        ),
    ]
    .into_iter()
    .filter_map(|(lacks, what)| lacks.then_some(what))
    .collect();
    (!lacking.is_empty()).then(|| {
        Finding::blocking(
            "CalicoWithoutIpv6",
            format!("DaemonSet {}", calico.daemon_set),
            format!("flannel carries IPv6, and Calico isn't set up for it: it lacks {}", lacking.join("; ")),
            format!(
                "Set these in Calico's manifest (the CNI config is {} of ConfigMap {}/{}), and apply it",
                calico.template_key, calico.daemon_set.namespace, calico.config_map
            ),
        )
    })
}

/// Whether pods get an address of each family. Unasked, Calico's IPAM gives one of IPv4.
fn assigns_ipv6(template: &str) -> bool {
    let Ok(config) = completed(template) else { return false };
    let plugins = plugins(&config);
    let says = |name: &str| {
        let value = plugins.first().and_then(|first| first.get("ipam"))?.get(name)?;
        value.as_str().map(|text| text == "true")
    };
    says("assign_ipv4") != Some(false) && says("assign_ipv6") == Some(true)
}

/// The blocks that hold a network or are held by it.
fn overlapping<'a>(
    blocks: &'a BTreeMap<IpNet, Option<&'a str>>,
    cidr: &IpNet,
) -> impl Iterator<Item = (&'a IpNet, Option<&'a str>)> {
    let cidr = cidr.trunc();
    let around = std::iter::successors(cidr.supernet(), IpNet::supernet);
    let around = around.filter_map(|wider| blocks.get_key_value(&wider));
    // By address, then by length: those within follow it.
    let within = blocks.range(cidr..).take_while(move |(block, _)| cidr.contains(*block));
    around.chain(within).map(|(block, owner)| (block, *owner))
}

fn foreign_block(node: &NodeFacts, block: &IpNet, owner: Option<&str>) -> Finding {
    let owner = owner.unwrap_or("nobody");
    Finding::fatal(
        "BlockOfAnotherNode",
        format!("IPAMBlock {}", crate::calico::names::block(block)),
        format!(
            "block {block} in the network of node {} belongs to {owner}, or isn't of the size that is needed",
            node.name
        ),
        "If no pod of Calico's has an address of it: calicoctl ipam check, then delete the IPAMBlock and its BlockAffinity",
    )
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(r#"{"plugins":[{"type":"calico","mtu":__CNI_MTU__,"nodename":"__KUBERNETES_NODE_NAME__","ipam":{"type":"calico-ipam"}}]}"#, None)]
    #[case(r#"{"plugins":[{"type":"calico","ipam":{"type":"host-local"}}]}"#, Some("host-local"))]
    #[case(r#"{"plugins":[{"type":"flannel"}]}"#, Some("flannel"))]
    #[case("{", Some("no JSON"))]
    #[case(r#"{"plugins":[{"type":"calico","a":"__B_2__","ipam":{"type":"calico-ipam"}}]}"#, Some("__B_2__"))]
    #[case(
        r#"{"plugins":[{"type":"calico","a":__REQUIRE_MTU_FILE__,"b":"__CALICO_API_GROUP__","ipam":{"type":"calico-ipam"}}]}"#,
        None
    )]
    fn a_template_that_is_not_calicos_is_told(#[case] template: &str, #[case] why: Option<&str>) {
        let told = unusable(&crate::settings::tests::settings().calico, template);
        assert_eq!(told.is_some(), why.is_some(), "{told:?}");
        assert!(why.is_none_or(|why| told.as_deref().unwrap_or_default().contains(why)), "{told:?}");
    }

    #[test]
    fn blocks_around_and_within_a_network_overlap_it_and_no_others() {
        let nets =
            ["10.0.0.0/24", "10.0.1.0/26", "10.0.1.64/26", "10.0.2.0/26", "10.0.0.0/16", "10.0.1.0/24"];
        let blocks: BTreeMap<IpNet, Option<&str>> =
            nets.iter().map(|net| (net.parse().unwrap(), None)).collect();
        let found = |cidr: &str| -> Vec<String> {
            overlapping(&blocks, &cidr.parse().unwrap()).map(|(block, _)| block.to_string()).collect()
        };
        assert_eq!(found("10.0.1.0/24"), ["10.0.0.0/16", "10.0.1.0/24", "10.0.1.0/26", "10.0.1.64/26"]);
        assert_eq!(found("10.0.1.64/27"), ["10.0.1.64/26", "10.0.1.0/24", "10.0.0.0/16"]);
        assert_eq!(found("10.1.0.0/24"), [""; 0]);
    }

    #[test]
    fn only_plugins_that_calico_does_not_bring_must_be_there() {
        let template = r#"{"plugins":[{"type":"calico","mtu":__CNI_MTU__,"ipam":{"type":"calico-ipam"}},{"type":"portmap"},{"type":"sbr"},{"type":"bandwidth"}]}"#;
        assert_eq!(foreign_plugins(template, Some(Version(3, 29, 7))), ["sbr"]);
        assert_eq!(foreign_plugins(template, None), ["sbr"]);
        assert_eq!(foreign_plugins(template, Some(Version(3, 30, 0))), ["sbr", "bandwidth"]);
    }
}
