use flannel_migration_protocol::{Field, Network, NodeView, State, Strategy};

use super::*;
use crate::preflight::calico::Datastore;
use crate::preflight::drain::Workloads;
use crate::preflight::server::Server;
use crate::settings::tests::detected;

fn survey() -> Survey {
    Survey {
        detected: detected(),
        net_conf_error: None,
        net_conf_forbidden: false,
        finishing: None,
        calico_pods: (0, 0),
        agents: true,
        addon_managed: false,
        datastore: Datastore { definitions: true, ..Datastore::default() },
        server: Server { version: Some((1, 34)), ..Server::default() },
        windows: Vec::new(),
        workloads: Workloads::default(),
    }
}

fn node(name: &str) -> NodeFacts {
    // Each has addresses of its own.
    let number = name.bytes().next().unwrap();
    let annotations = [
        ("flannel.alpha.coreos.com/backend-type", "vxlan".to_owned()),
        (
            "flannel.alpha.coreos.com/backend-data",
            format!(r#"{{"VNI":1,"VtepMAC":"8e:74:9a:30:24:{number:02x}"}}"#),
        ),
        ("flannel.alpha.coreos.com/public-ip", format!("172.16.0.{number}")),
    ];
    NodeFacts {
        name: name.into(),
        ready: true,
        pod_cidrs: vec![format!("10.244.{number}.0/24").parse().unwrap()],
        annotations: annotations.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        view: NodeView { state: Field::Present(State::Flannel), ..NodeView::default() },
        ..NodeFacts::default()
    }
}

fn examine(
    survey: &Survey,
    stated: &Stated,
    strategy: Strategy,
    nodes: &[NodeFacts],
) -> (Verdict, Vec<Finding>) {
    let nodes: Vec<_> = nodes.iter().cloned().map(Arc::new).collect();
    super::examine(survey, stated, strategy, &nodes)
}

fn reasons(survey: &Survey, nodes: &[NodeFacts]) -> Vec<&'static str> {
    examine(survey, &Stated::default(), Strategy::InPlace, nodes)
        .1
        .iter()
        .map(|finding| finding.reason)
        .collect()
}

#[test]
fn a_cluster_as_documented_is_ready() {
    let (verdict, findings) = examine(&survey(), &Stated::default(), Strategy::InPlace, &[node("a")]);
    assert!(matches!(verdict, Verdict::Ready(_)), "{findings:?}");
}

#[test]
fn everything_in_the_way_is_found_at_once() {
    let mut survey = survey();
    survey.detected.flannel[0].kube_subnet_manager = false;
    survey.detected.net_conf = crate::discover::net_conf(
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw","DirectRouting":true}}"#,
    )
    .ok();
    survey.datastore.definitions = false;
    survey.addon_managed = true;
    survey.detected.calico.clear();
    assert_eq!(
        reasons(&survey, &[node("a")]),
        [
            "AddonManaged",
            "BackendNotVxlan",
            "DirectRouting",
            "SubnetsInEtcd",
            "CalicoDefinitionsMissing",
            "CalicoNotFound"
        ]
    );
}

#[test]
fn nodes_without_agent_annotations_or_room_are_named() {
    let mut silent = node("a");
    silent.view.state = Field::Absent;
    let mut bare = node("b");
    bare.annotations.clear();
    let mut large = node("c");
    large.pod_cidrs = vec!["10.244.2.0/26".parse().unwrap()];
    let mut small = node("d");
    small.pod_cidrs = vec!["10.244.3.0/28".parse().unwrap()];
    assert_eq!(
        reasons(&survey(), &[silent.clone(), bare.clone()]),
        ["AgentSilent", "NodeNotAnnotatedByFlannel"]
    );
    assert!(
        reasons(&survey(), &[small, large]).is_empty(),
        "the smallest network decides on the size of blocks"
    );
    // Mid-run, a migrated node has no flannel and needs none.
    bare.view.network = Field::Present(Network::Calico);
    assert!(reasons(&survey(), &[bare]).is_empty());
}

#[test]
fn agents_that_are_not_applied_are_one_finding() {
    let mut survey = survey();
    survey.agents = false;
    let mut silent = node("a");
    silent.view.state = Field::Absent;
    assert_eq!(reasons(&survey, &[silent]), [AGENTS_MISSING]);
}

#[test]
fn a_calico_that_does_not_wait_is_fatal() {
    let mut survey = survey();
    if let Ok(calico) = &mut survey.detected.calico[0] {
        calico.waits = false;
    }
    assert_eq!(reasons(&survey, &[node("a")]), ["CalicoDoesNotWait"]);
}

#[test]
fn without_flannel_a_cluster_is_migrated_already_or_not_understood() {
    let mut survey = survey();
    survey.detected.flannel.clear();
    assert_eq!(reasons(&survey, &[node("a")]), ["FlannelNotFound"]);
    if let Ok(calico) = &mut survey.detected.calico[0] {
        calico.waits = false;
    }
    assert_eq!(reasons(&survey, &[node("a")]), ["CalicoNotEverywhere"]);
    survey.calico_pods = (1, 1);
    assert_eq!(
        examine(&survey, &Stated::default(), Strategy::InPlace, &[node("a")]).0,
        Verdict::AlreadyMigrated
    );
    let mut labelled = node("a");
    labelled.view.network = Field::Present(Network::Calico);
    assert_eq!(reasons(&survey, &[labelled]), ["FlannelNotFound"]);
}

/// A node whose agent has told about its host.
fn seen(name: &str, change: impl FnOnce(&mut flannel_migration_protocol::HostFacts)) -> NodeFacts {
    let mut node = node(name);
    let number = name.bytes().next().unwrap();
    let mut host = serde_json::from_value(serde_json::json!({
        "rpFilter": 1,
        "vxlan": [{ "name": "flannel.1", "vni": 1, "port": 8472, "mac": format!("8e:74:9a:30:24:{number:02x}"), "mtu": 1450 }],
        "plugins": ["bridge"],
        "interfaces": [{ "name": "eth0", "addresses": [format!("172.16.0.{number}/24")] }],
    }))
    .unwrap();
    change(&mut host);
    node.view.report = Field::Present(flannel_migration_protocol::Report {
        epoch: None,
        state: State::Flannel,
        step: String::new(),
        since: "2026-01-02T03:04:05Z".parse().unwrap(),
        reason: "Started".into(),
        message: String::new(),
        evict: vec![],
        host: Some(host),
    });
    node
}

#[test]
fn what_an_agent_sees_is_judged() {
    let survey = survey();
    assert!(reasons(&survey, &[seen("a", |_| {})]).is_empty());
    let device = |change: fn(&mut flannel_migration_protocol::VxlanDevice)| {
        seen("a", |host| change(&mut host.vxlan[0]))
    };
    for (node, reason) in [
        (seen("a", |host| host.rp_filter = Some(2)), "RpFilterNotStrict"),
        (seen("a", |host| host.vxlan.clear()), "VxlanDeviceMissing"),
        (device(|device| device.port = 4789), "VxlanDiffers"),
        (device(|device| device.mac = "8e:74:9a:30:24:ff".into()), "AnnotationDiffers"),
        (device(|device| device.mtu = 1400), "MtuDiffers"),
        (
            seen("a", |host| {
                let storage = serde_json::json!({ "name": "eth1", "addresses": ["192.168.9.1/24"] });
                host.interfaces.push(serde_json::from_value(storage).unwrap());
            }),
            "AutodetectionDiffers",
        ),
    ] {
        assert_eq!(reasons(&survey, &[node]), [reason]);
    }
    let mut sbr = survey.clone();
    sbr.detected.template =
        Some(r#"{"plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}},{"type":"sbr"}]}"#.into());
    assert_eq!(reasons(&sbr, &[seen("a", |_| {})]), ["CniPluginMissing"]);
}

#[test]
fn a_node_that_is_held_holds_no_others() {
    let held = seen("a", |host| host.rp_filter = Some(0));
    let (verdict, findings) = examine(&survey(), &Stated::default(), Strategy::InPlace, &[held, node("b")]);
    assert!(matches!(verdict, Verdict::Ready(_)) && findings.len() == 1, "{findings:?}");
}

#[test]
fn addresses_that_are_not_a_nodes_own_are_told() {
    let mut twin = node("b");
    twin.annotations = node("a").annotations;
    assert_eq!(reasons(&survey(), &[node("a"), twin]), ["VtepNotUnique", "VtepNotUnique"]);
    let mut overlapping = node("b");
    overlapping.pod_cidrs = vec!["10.244.96.0/20".parse().unwrap()];
    assert_eq!(reasons(&survey(), &[node("a"), overlapping]), ["PodCidrShared"]);
}

#[test]
fn a_configuration_that_was_changed_without_a_restart_is_told_by_the_annotations() {
    let mut survey = survey();
    survey.detected.net_conf =
        crate::discover::net_conf(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#).ok();
    assert_eq!(reasons(&survey, &[node("a")]), ["AnnotationDiffers"]);
}

#[test]
fn what_calicos_datastore_holds_is_judged_before_anything_is_written() {
    let mut survey = survey();
    let wanted = crate::calico::prepare::pool("10.244.0.0/16".parse().unwrap(), 26, true);
    survey.datastore.pools = vec![("default-ipv4-ippool".into(), wanted.clone())];
    survey.datastore.blocks = vec![("10.244.97.0/26".parse().unwrap(), Some("host:a".into()))];
    assert!(reasons(&survey, &[node("a")]).is_empty());
    survey.datastore.blocks[0].1 = Some("host:b".into());
    survey.datastore.pools[0].1.vxlan_mode = Some("Never".into());
    survey.datastore.pools.push(("mine".into(), wanted));
    assert_eq!(reasons(&survey, &[node("a")]), ["BlockOfAnotherNode", "PoolDiffers", "PoolOverlaps"]);
}

/// Of both families, with a Calico that is ready for that.
fn dual_stack() -> Survey {
    let mut survey = survey();
    survey.detected.net_conf = crate::discover::net_conf(
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#,
    )
    .ok();
    survey.detected.template = Some(
        r#"{"plugins":[{"type":"calico","ipam":{"type":"calico-ipam","assign_ipv4":"true","assign_ipv6":"true"}}]}"#
            .into(),
    );
    survey
}

fn dual_stack_node(name: &str) -> NodeFacts {
    let mut node = node(name);
    let number = name.bytes().next().unwrap();
    node.pod_cidrs.push(format!("fd00:10:244:{number:x}::/64").parse().unwrap());
    let data = format!(r#"{{"VNI":1,"VtepMAC":"8e:74:9a:30:26:{number:02x}"}}"#);
    let annotations =
        [("backend-v6-data", data), ("public-ipv6", format!("fd00:172::{number:x}"))].into_iter();
    node.annotations
        .extend(annotations.map(|(name, value)| (format!("flannel.alpha.coreos.com/{name}"), value)));
    node
}

#[test]
fn a_cluster_of_both_families_is_ready_once_calico_is() {
    let mut survey = dual_stack();
    let (verdict, findings) = examine(
        &survey,
        &Stated::default(),
        Strategy::InPlace,
        &[dual_stack_node("a"), dual_stack_node("b")],
    );
    assert!(matches!(verdict, Verdict::Ready(_)), "{findings:?}");
    // As it is in Calico's stock manifest.
    if let Ok(calico) = &mut survey.detected.calico[0] {
        calico.ipv6 = crate::discover::Ipv6::default();
    }
    survey.detected.template = detected().template;
    let (_, findings) = examine(&survey, &Stated::default(), Strategy::InPlace, &[dual_stack_node("a")]);
    assert_eq!(findings.iter().map(|finding| finding.reason).collect::<Vec<_>>(), ["CalicoWithoutIpv6"]);
    for what in ["FELIX_IPV6SUPPORT=true", "IP6=autodetect", "assign_ipv6"] {
        assert!(findings[0].found.contains(what), "{}", findings[0]);
    }
}

#[test]
fn what_flannel_says_of_ipv6_is_judged_as_what_it_says_of_ipv4() {
    let wrong = |change: fn(&mut NodeFacts)| {
        let mut node = dual_stack_node("a");
        change(&mut node);
        reasons(&dual_stack(), &[node])
    };
    let annotate = |node: &mut NodeFacts, name: &str, value: &str| {
        node.annotations.insert(format!("flannel.alpha.coreos.com/{name}"), value.to_owned());
    };
    assert_eq!(wrong(|node| node.pod_cidrs.truncate(1)), ["NodeWithoutPodCidr"]);
    assert_eq!(wrong(|node| node.pod_cidrs[1] = "fd00::/64".parse().unwrap()), ["PodCidrOutsideNetwork"]);
    assert_eq!(
        wrong(|node| node.pod_cidrs[1] = "fd00:10:244::/127".parse().unwrap()),
        ["NodeNetworkTooSmall"]
    );
    let mut node = dual_stack_node("a");
    annotate(&mut node, "backend-v6-data", "null");
    assert_eq!(reasons(&dual_stack(), &[node.clone()]), ["NodeNotAnnotatedByFlannel"]);
    assert!(reasons(&survey(), &[node.clone()]).is_empty(), "without IPv6 nobody asks");
    annotate(&mut node, "backend-v6-data", r#"{"VNI":4096,"VtepMAC":"8e:74:9a:30:26:61"}"#);
    assert_eq!(reasons(&dual_stack(), &[node.clone()]), ["AnnotationDiffers"]);
    annotate(&mut node, "backend-v6-data", r#"{"VNI":1,"VtepMAC":"8e:74:9a:30:26:62"}"#);
    annotate(&mut node, "public-ipv6", "172.16.0.97");
    assert_eq!(
        reasons(&dual_stack(), &[node.clone(), dual_stack_node("b")]),
        ["VtepNotUnique", "NodeNotAnnotatedByFlannel"]
    );
}

#[test]
fn ipv6_alone_and_canal_with_ipv6_are_refused() {
    let mut survey = dual_stack();
    survey.detected.flannel[0].canal = true;
    assert_eq!(reasons(&survey, &[dual_stack_node("a")]), ["Ipv6Unsupported"]);
    let mut survey = dual_stack();
    survey.detected.net_conf = crate::discover::net_conf(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#,
    )
    .ok();
    assert!(reasons(&survey, &[dual_stack_node("a")]).contains(&"Ipv6Unsupported"));
}

#[test]
fn the_pool_and_the_blocks_of_ipv6_are_judged_too() {
    let mut survey = dual_stack();
    let wanted = crate::calico::prepare::pool("fd00:10:244::/56".parse().unwrap(), 122, true);
    survey.datastore.pools = vec![("default-ipv6-ippool".into(), wanted.clone())];
    survey.datastore.blocks = vec![("fd00:10:244:61::/122".parse().unwrap(), Some("host:a".into()))];
    assert!(reasons(&survey, &[dual_stack_node("a")]).is_empty());
    survey.datastore.blocks[0].1 = Some("host:b".into());
    survey.datastore.pools[0].1.nat_outgoing = Some(false);
    survey.datastore.pools.push(("mine".into(), wanted));
    assert_eq!(
        reasons(&survey, &[dual_stack_node("a")]),
        ["BlockOfAnotherNode", "PoolDiffers", "PoolOverlaps"]
    );
}

#[test]
fn an_old_api_server_is_told() {
    let mut survey = survey();
    survey.server.version = Some((1, 29));
    assert_eq!(reasons(&survey, &[node("a")]), ["ApiServerTooOld"]);
}
