//! Findings about flannel.

use serde_json::{Value, json};

use super::world::{CALICO, DRAIN, FLANNEL, FLANNEL_CONFIG, World};

const DAEMON: &str = "DaemonSet kube-flannel/kube-flannel-ds";
const CONFIG: &str = "ConfigMap kube-flannel/kube-flannel-cfg";

fn container(set: &mut Value) -> &mut Value {
    &mut set["spec"]["template"]["spec"]["containers"][0]
}

/// flannel's configuration with some fields changed.
fn net_conf(config: &mut Value, change: impl FnOnce(&mut Value)) {
    let mut conf: Value = serde_json::from_str(config["data"]["net-conf.json"].as_str().unwrap()).unwrap();
    change(&mut conf);
    config["data"]["net-conf.json"] = json!(conf.to_string());
}

pub fn all(world: &mut World) {
    daemon(world);
    configuration(world);
    secret(world);
    more_than_one(world);
    already_gone(world);
}

fn daemon(world: &mut World) {
    world.case(&FLANNEL, &[("FlannelNotFound", "DaemonSets")], |set| {
        container(set)["command"] = json!(["/bin/something"]);
    });
    world.case(&FLANNEL, &[("FlannelTooOld", DAEMON)], |set| {
        container(set)["image"] = json!("quay.io/coreos/flannel:v0.9.0-amd64");
    });
    let original = world.edit(&FLANNEL, |set| {
        let calico = json!({ "name": "calico-node", "image": "quay.io/calico/node:v3.6.1" });
        set["spec"]["template"]["spec"]["containers"].as_array_mut().unwrap().push(calico);
    });
    world.expect_with(DRAIN, &[("CanalNotDrained", DAEMON), ("CanalTooOld", DAEMON)]);
    world.expect(&[("CanalTooOld", DAEMON)]);
    world.put(&original);
    world.expect_clear();
    world.case(&FLANNEL, &[("SubnetsInEtcd", DAEMON)], |set| {
        container(set)["args"] = json!(["--ip-masq", "--etcd-endpoints=http://127.0.0.1:2379"]);
    });
    world.case(&FLANNEL, &[("AddonManaged", DAEMON)], |set| {
        set["metadata"]["labels"]["addonmanager.kubernetes.io/mode"] = json!("Reconcile");
    });
    let kept = world.case(&FLANNEL, &[("ManagedElsewhere", DAEMON)], |set| {
        set["metadata"]["annotations"]["meta.helm.sh/release-name"] = json!("flannel");
    });
    assert_eq!(kept[0].severity, "warning");
}

fn configuration(world: &mut World) {
    for backend in ["host-gw", "wireguard", "ipsec", "udp", "ipip", "extension", "alloc", "tencent-vpc"] {
        let original = world.edit(&FLANNEL_CONFIG, |config| {
            net_conf(config, |conf| conf["Backend"]["Type"] = json!(backend));
        });
        let found = world.expect(&[("BackendNotVxlan", CONFIG)]);
        assert!(found[0].what.contains(backend), "{found:#?}");
        world.put(&original);
    }
    world.expect_clear();
    world.case(&FLANNEL_CONFIG, &[("DirectRouting", CONFIG)], |config| {
        net_conf(config, |conf| conf["Backend"]["DirectRouting"] = json!(true));
    });
    world.case(&FLANNEL_CONFIG, &[("Ipv6Unsupported", CONFIG)], |config| {
        net_conf(config, |conf| conf["EnableIPv4"] = json!(false));
    });
    // Calico's stock manifest has IPv6 switched off, and these nodes never had it.
    let both = [
        ("CalicoWithoutIpv6", "DaemonSet kube-system/calico-node"),
        ("NodeWithoutPodCidr", "Node n1"),
        ("NodeWithoutPodCidr", "Node n2"),
        ("VxlanDeviceMissing", "Node n1"),
        ("VxlanDeviceMissing", "Node n2"),
    ];
    world.case(&FLANNEL_CONFIG, &both, |config| {
        net_conf(config, |conf| {
            conf["EnableIPv6"] = json!(true);
            conf["IPv6Network"] = json!("fd00:10:244::/56");
        });
    });
    world.case(&FLANNEL_CONFIG, &[("NotDetected", CONFIG)], |config| {
        net_conf(config, |conf| conf["EnableIPv6"] = json!(true));
    });
    world.case(&FLANNEL_CONFIG, &[("FlannelConfigUnreadable", CONFIG)], |config| {
        config["data"]["net-conf.json"] = json!("{");
    });
    world.case(&FLANNEL_CONFIG, &[("NotDetected", CONFIG)], |config| {
        net_conf(config, |conf| {
            conf.as_object_mut().unwrap().remove("Network");
        });
    });
    let annotated = [("AnnotationDiffers", "Node n1"), ("AnnotationDiffers", "Node n2")];
    let devices = [("VxlanDeviceMissing", "Node n1"), ("VxlanDeviceMissing", "Node n2")];
    let unknown = [("NotDetected", "FLANNEL_MTU")];
    let original = world.edit(&FLANNEL_CONFIG, |config| {
        // In another case than flannel's own manifest has it: flannel takes both.
        net_conf(config, |conf| conf["Backend"]["vni"] = json!(4096));
    });
    world.expect(&unknown);
    let both: Vec<_> = annotated.into_iter().chain(devices).collect();
    world.expect_with(&[("FLANNEL_MTU", "1450")], &both);
    world.put(&original);
    world.expect_clear();
}

/// As RKE2 has it.
fn secret(world: &mut World) {
    let text = world.bed().get(&FLANNEL_CONFIG).unwrap()["data"]["net-conf.json"].clone();
    world.apply(&[json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "flannel-config", "namespace": "kube-flannel" },
        "stringData": { "net-conf.json": text },
    })]);
    let original = world.edit(&FLANNEL, |set| {
        let volumes = set["spec"]["template"]["spec"]["volumes"].as_array_mut().unwrap();
        let volume = volumes.iter_mut().find(|volume| volume["name"] == "flannel-cfg").unwrap();
        *volume = json!({ "name": "flannel-cfg", "secret": { "secretName": "flannel-config" } });
    });
    let found = world.expect(&[("FlannelConfigForbidden", "Secret kube-flannel/flannel-config")]);
    world.follow(&found[0].remedy);
    world.expect_clear();
    world.put(&original);
    world.expect_clear();
}

fn more_than_one(world: &mut World) {
    let mut second = world.bed().get(&FLANNEL).unwrap();
    second["metadata"] = json!({ "name": "another", "namespace": "default" });
    world.create(&second);
    world.expect(&[("Ambiguous", "default/another, kube-flannel/kube-flannel-ds")]);
    let named =
        [("FLANNEL_DAEMONSET_NAME", "kube-flannel-ds"), ("FLANNEL_DAEMONSET_NAMESPACE", "kube-flannel")];
    world.expect_with(&named, &[]);
    world.kubectl(&["delete", "daemonset", "another"]);
    world.expect_clear();
}

/// Calico in flannel's place, but not everywhere.
fn already_gone(world: &mut World) {
    let flannel = world.edit(&FLANNEL, |set| container(set)["command"] = json!(["/bin/something"]));
    let calico = world.edit(&CALICO, |set| {
        set["spec"]["template"]["spec"]["nodeSelector"] = json!({ "kubernetes.io/os": "linux" });
    });
    world.expect(&[("CalicoNotEverywhere", "DaemonSet kube-system/calico-node")]);
    world.put(&calico);
    world.put(&flannel);
    world.expect_clear();
}
