use super::*;

fn daemon_sets(yaml: &str) -> Vec<DaemonSet> {
    vec![serde_saphyr::from_str(yaml).unwrap()]
}

pub(crate) const FLANNEL: &str = r"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: renamed-flannel, namespace: net}
spec:
  selector: {}
  template:
    spec:
      serviceAccountName: flannel
      containers:
      - name: anything
        image: registry/flannel:v1
        command: [/opt/bin/flanneld]
        args: [--ip-masq, --kube-subnet-mgr, --kube-annotation-prefix=f.example]
        volumeMounts:
        - {name: run, mountPath: /run/flannel}
        - {name: cfg, mountPath: /etc/kube-flannel/}
      volumes:
      - {name: run, hostPath: {path: /run/flannel}}
      - {name: cni, hostPath: {path: /etc/cni/net.d}}
      - {name: cfg, configMap: {name: kube-flannel-cfg}}
";

#[test]
fn flannel_is_known_by_what_it_runs() {
    let found = flannel_daemons(&daemon_sets(FLANNEL));
    assert_eq!(
        found,
        vec![FlannelDaemon {
            daemon_set: Name { namespace: "net".into(), name: "renamed-flannel".into() },
            config_map: "kube-flannel-cfg".into(),
            config_secret: None,
            config_key: "net-conf.json".into(),
            service_account: Some("flannel".into()),
            ip_masq: true,
            annotation_prefix: "f.example".into(),
            kube_subnet_manager: true,
            cni_conf_dir: "/etc/cni/net.d".into(),
            canal: false,
            version: None,
            canal_version: None,
            keeper: None,
        }]
    );
    let other = FLANNEL.replace("/opt/bin/flanneld", "/bin/proxy");
    assert!(flannel_daemons(&daemon_sets(&other)).is_empty());
}

#[test]
fn flags_of_flanneld_are_read_in_every_spelling() {
    for (args, on) in [
        ("[-ip-masq]", true),
        ("[--ip-masq=true]", true),
        ("[--ip-masq, 'true']", true),
        ("[--ip-masq=false]", false),
        ("[--ip-masq-all]", false),
        ("[]", false),
    ] {
        let yaml =
            FLANNEL.replace("[--ip-masq, --kube-subnet-mgr, --kube-annotation-prefix=f.example]", args);
        let found = flannel_daemons(&daemon_sets(&yaml));
        assert_eq!(found[0].ip_masq, on, "{args}");
        assert_eq!(found[0].annotation_prefix, ANNOTATION_PREFIX);
    }
}

#[test]
fn the_configuration_is_where_it_is_mounted_from_under_whatever_key() {
    let secret = FLANNEL.replace(
        "configMap: {name: kube-flannel-cfg}",
        "secret: {secretName: rke2-canal-config, items: [{key: net, path: net-conf.json}]}",
    );
    let found = flannel_daemons(&daemon_sets(&secret)).remove(0);
    assert_eq!((found.config_map.as_str(), found.config_key.as_str()), ("", "net"));
    assert_eq!(found.config_object(), "Secret net/rke2-canal-config");
    let elsewhere = FLANNEL.replace("args: [", "args: [--net-config-path=/etc/net/conf.json, ");
    assert_eq!(flannel_daemons(&daemon_sets(&elsewhere))[0].config_map, "");
}

#[test]
fn versions_are_those_of_the_images() {
    let canal = FLANNEL
        .replace(
            "      - name: anything",
            "      - {name: calico-node, image: 'calico/node:v3.6.1'}\n      - name: anything",
        )
        .replace("registry/flannel:v1", "registry/flannel:v0.9.0-amd64");
    let found = flannel_daemons(&daemon_sets(&canal)).remove(0);
    assert_eq!((found.version, found.canal_version), (Some(Version(0, 9, 0)), Some(Version(3, 6, 1))));
}

#[test]
fn canal_is_flannel_with_calico_in_its_pods_and_not_calico() {
    let canal = FLANNEL.replace(
        "      - name: anything",
        "      - {name: calico-node, image: node}\n      - name: anything",
    );
    assert!(flannel_daemons(&daemon_sets(&canal))[0].canal);
    assert!(calico_daemons(&daemon_sets(&canal)).is_empty());
}

const CALICO: &str = r"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: calico-node, namespace: kube-system}
spec:
  selector: {}
  template:
    spec:
      nodeSelector: {projectcalico.org/node-network-during-migration: calico}
      initContainers:
      - name: install-cni
        image: cni:1
        env:
        - {name: CNI_CONF_NAME, value: 10-calico.conflist}
        - {name: CNI_NETWORK_CONFIG, valueFrom: {configMapKeyRef: {name: calico-config, key: cni_network_config}}}
        - {name: CNI_MTU, valueFrom: {configMapKeyRef: {name: calico-config, key: veth_mtu}}}
      - {name: init, image: node:1}
      containers:
      - {name: calico-node, image: node:1}
";

#[test]
fn calico_says_what_its_installer_writes() {
    let found = calico_daemons(&daemon_sets(CALICO)).remove(0).unwrap();
    assert_eq!(found.cni_conf_name, "10-calico.conflist");
    assert_eq!(
        (found.config_map.as_str(), found.template_key.as_str()),
        ("calico-config", "cni_network_config")
    );
    assert_eq!(found.mtu_key.as_deref(), Some("veth_mtu"));
    assert_eq!(found.images, ["cni:1", "node:1"]);
    assert!(found.waits && found.health_port == 9099);
    assert_eq!((found.version, found.datastore, found.autodetection), (None, None, None));
    let detecting = CALICO.replace(
        "{name: calico-node, image: node:1}",
        "{name: calico-node, image: 'n:v3.28.5', env: [{name: IP, value: autodetect}, {name: DATASTORE_TYPE, value: etcdv3}]}",
    );
    let found = calico_daemons(&daemon_sets(&detecting)).remove(0).unwrap();
    assert_eq!(found.version, Some(Version(3, 28, 5)));
    assert_eq!(
        (found.datastore.as_deref(), found.autodetection.as_deref()),
        (Some("etcdv3"), Some("first-found"))
    );
}

#[test]
fn calico_carries_ipv6_unless_felix_is_told_not_to_and_finds_addresses_only_when_asked() {
    let with = |env: &str| {
        let yaml = CALICO.replace(
            "{name: calico-node, image: node:1}",
            &format!("{{name: calico-node, image: node, env: [{env}]}}"),
        );
        calico_daemons(&daemon_sets(&yaml)).remove(0).unwrap().ipv6
    };
    assert_eq!(with(""), Ipv6 { felix: true, autodetection: None });
    let stock = "{name: FELIX_IPV6SUPPORT, value: 'false'}, {name: IP, value: autodetect}";
    assert_eq!(with(stock), Ipv6::default());
    let ready = "{name: FELIX_IPV6SUPPORT, value: 'true'}, {name: IP6, value: autodetect}";
    assert_eq!(with(ready), Ipv6 { felix: true, autodetection: Some("first-found".into()) });
    let method = "{name: IP6, value: autodetect}, {name: IP6_AUTODETECTION_METHOD, value: interface=eth0}";
    assert_eq!(with(method).autodetection.as_deref(), Some("interface=eth0"));
}

#[test]
fn a_calico_whose_config_name_is_not_literal_is_a_finding() {
    let yaml =
        CALICO.replace("value: 10-calico.conflist", "valueFrom: {fieldRef: {fieldPath: spec.nodeName}}");
    let finding = calico_daemons(&daemon_sets(&yaml)).remove(0).unwrap_err();
    assert_eq!(finding.reason, "CalicoManifestUnusable");
}

#[test]
fn flannels_configuration_is_read_as_flannel_spells_it() {
    let conf = net_conf(
        r#"{"Network":"10.244.0.0/16","EnableNFTables":false,"Backend":{"Type":"vxlan","VNI":4096,"Port":4789}}"#,
    )
    .unwrap();
    assert_eq!(conf.network, "10.244.0.0/16".parse().ok());
    assert_eq!(
        (conf.backend.vni, conf.backend.port, conf.backend.direct_routing),
        (Some(4096), Some(4789), false)
    );
}

#[test]
fn names_in_the_configuration_are_taken_in_any_case_as_flannel_takes_them() {
    let conf =
        net_conf(r#"{"network":"10.244.0.0/16","backend":{"type":"VXLAN","vni":7,"directRouting":true}}"#)
            .unwrap();
    assert_eq!((conf.backend.vni, conf.backend.direct_routing), (Some(7), true));
    assert!(net_conf("[]").is_err() && net_conf(r#"{"Network":"10.244"}"#).is_err());
}
