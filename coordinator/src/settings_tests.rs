use rstest::rstest;

use super::*;
use crate::discover::Ipv6;
use crate::installer::Installer;
use crate::origin::Version;

pub(crate) fn detected() -> Detected {
    let flannel = FlannelDaemon {
        daemon_set: Name { namespace: "kube-flannel".into(), name: "kube-flannel-ds".into() },
        config_map: "kube-flannel-cfg".into(),
        config_secret: None,
        config_key: "net-conf.json".into(),
        service_account: Some("flannel".into()),
        ip_masq: true,
        annotation_prefix: "flannel.alpha.coreos.com".into(),
        kube_subnet_manager: true,
        cni_conf_dir: "/etc/cni/net.d".into(),
        canal: false,
        version: Some(Version(0, 28, 10)),
        canal_version: None,
        keeper: None,
    };
    let calico = CalicoDaemon {
        daemon_set: Name { namespace: "kube-system".into(), name: "calico-node".into() },
        cni_conf_name: "10-calico.conflist".into(),
        config_map: "calico-config".into(),
        template_key: "cni_network_config".into(),
        mtu_key: Some("veth_mtu".into()),
        installer: Installer::default(),
        api_group: None,
        images: vec!["cni:1".into()],
        health_port: 9099,
        waits: true,
        version: Some(Version(3, 28, 5)),
        datastore: Some("kubernetes".into()),
        autodetection: Some("first-found".into()),
        ipv6: Ipv6 { felix: true, autodetection: Some("first-found".into()) },
        keeper: None,
    };
    Detected {
        flannel: vec![flannel],
        net_conf: crate::discover::net_conf(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).ok(),
        calico: vec![Ok(calico)],
        template: Some(
            r#"{"plugins":[{"type":"calico","mtu":__CNI_MTU__,"ipam":{"type":"calico-ipam"}}]}"#.into(),
        ),
        mtu: Some((1450, "flannel.1".into())),
        subnet_lens: vec![24, 24],
        kube_service_address: Some("10.96.0.1:443".into()),
    }
}

pub(crate) fn settings() -> Settings {
    settle(&Stated::default(), &detected()).unwrap()
}

type Setter = fn(&mut Stated) -> &mut Option<String>;

const SETTERS: [(&str, Setter, &str, &str); 12] = [
    ("FLANNEL_NETWORK", |stated| &mut stated.flannel_network, "10.244.0.0/16", "10.245.0.0/16"),
    ("FLANNEL_DAEMONSET_NAME", |stated| &mut stated.flannel_daemonset_name, "kube-flannel-ds", "canal"),
    (
        "FLANNEL_DAEMONSET_NAMESPACE",
        |stated| &mut stated.flannel_daemonset_namespace,
        "kube-flannel",
        "default",
    ),
    ("FLANNEL_MTU", |stated| &mut stated.flannel_mtu, "1450", "8951"),
    ("FLANNEL_IP_MASQ", |stated| &mut stated.flannel_ip_masq, "true", "false"),
    ("FLANNEL_SUBNET_LEN", |stated| &mut stated.flannel_subnet_len, "24", "25"),
    (
        "FLANNEL_ANNOTATION_PREFIX",
        |stated| &mut stated.flannel_annotation_prefix,
        "flannel.alpha.coreos.com",
        "x.y",
    ),
    ("FLANNEL_VNI", |stated| &mut stated.flannel_vni, "1", "4096"),
    ("FLANNEL_PORT", |stated| &mut stated.flannel_port, "8472", "4789"),
    ("CALICO_DAEMONSET_NAME", |stated| &mut stated.calico_daemonset_name, "calico-node", "calico"),
    (
        "CALICO_DAEMONSET_NAMESPACE",
        |stated| &mut stated.calico_daemonset_namespace,
        "kube-system",
        "calico-system",
    ),
    ("CNI_CONFIG_DIR", |stated| &mut stated.cni_config_dir, "/etc/cni/net.d", "/etc/kubernetes/cni"),
];

#[test]
fn what_is_not_stated_is_detected() {
    let settings = settle(&Stated::default(), &detected()).unwrap();
    let facts = &settings.flannel_facts;
    assert_eq!((facts.vni, facts.port, facts.mtu, settings.ip_masq), (1, 8472, 1450, true));
    assert_eq!(settings.networks(), ["10.244.0.0/16".parse().unwrap()]);
}

#[test]
fn what_is_stated_and_agrees_is_taken_and_what_contradicts_names_both() {
    for (variable, setter, right, wrong) in SETTERS {
        let mut stated = Stated::default();
        *setter(&mut stated) = Some(right.to_owned());
        assert!(settle(&stated, &detected()).is_ok(), "{variable}={right}");
        *setter(&mut stated) = Some(String::new());
        assert!(settle(&stated, &detected()).is_ok(), "{variable}=");
        *setter(&mut stated) = Some(wrong.to_owned());
        let findings = settle(&stated, &detected()).unwrap_err();
        assert_eq!(findings.len(), 1, "{findings:?}");
        let text = findings[0].to_string();
        assert!(text.contains(variable) && text.contains(wrong) && text.contains(right), "{text}");
    }
}

#[rstest]
#[case("FLANNEL_VNI", "somestring", "detected is 1")]
#[case("FLANNEL_NETWORK", "10.244.0.0", "detected is 10.244.0.0/16")]
#[case("FLANNEL_IP_MASQ", "yes", "detected is true")]
fn what_cannot_be_read_is_told_with_what_was_detected(
    #[case] variable: &str,
    #[case] text: &str,
    #[case] seen: &str,
) {
    let mut stated = Stated::default();
    let (_, setter, _, _) = SETTERS.into_iter().find(|(name, ..)| *name == variable).unwrap();
    *setter(&mut stated) = Some(text.to_owned());
    let findings = settle(&stated, &detected()).unwrap_err();
    assert_eq!(findings[0].reason, "SettingUnreadable");
    assert!(findings[0].found.contains(seen), "{}", findings[0]);
}

#[test]
fn an_mtu_that_is_not_detected_may_be_stated() {
    let mut unknown = detected();
    unknown.mtu = None;
    assert_eq!(settle(&Stated::default(), &unknown).unwrap_err()[0].object, "FLANNEL_MTU");
    let stated = Stated { flannel_mtu: Some("1400".into()), ..Stated::default() };
    assert_eq!(settle(&stated, &unknown).unwrap().calico_facts.mtu, 1400);
}

#[test]
fn of_two_flannels_one_must_be_named() {
    let mut two = detected();
    let mut second = two.flannel[0].clone();
    second.daemon_set.name = "kube-flannel-ds-arm64".into();
    two.flannel.push(second);
    assert_eq!(settle(&Stated::default(), &two).unwrap_err()[0].reason, "Ambiguous");
    let stated = Stated { flannel_daemonset_name: Some("kube-flannel-ds".into()), ..Stated::default() };
    assert_eq!(settle(&stated, &two).unwrap().flannel.daemon_set.name, "kube-flannel-ds");
}

#[test]
fn a_cluster_of_both_families_has_both_networks_ipv4_first() {
    let with = |text: &str| {
        let mut both = detected();
        both.net_conf = crate::discover::net_conf(text).ok();
        settle(&Stated::default(), &both)
    };
    let both = with(
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#,
    );
    let both = both.unwrap();
    let networks: Vec<String> = both.networks().iter().map(ToString::to_string).collect();
    assert_eq!(networks, ["10.244.0.0/16", "fd00:10:244::/56"]);
    assert!(both.dual_stack() && !settings().dual_stack());
    // Switched off, it may still be written there, as k3s does.
    let off = with(r#"{"Network":"10.244.0.0/16","IPv6Network":"::/0","Backend":{"Type":"vxlan"}}"#).unwrap();
    assert_eq!(off.networks().len(), 1);
    let unknown = with(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"Backend":{"Type":"vxlan"}}"#);
    assert_eq!(unknown.unwrap_err()[0].reason, "NotDetected");
}
