//! Findings about nodes: what flannel announced for them, and what their agents see.

use serde_json::{Value, json};

use super::world::{CALICO, CALICO_CONFIG, DRAIN, World, cidr, host, node, report};

const N1: [&str; 2] = ["node", "n1"];
const PREFIX: &str = "flannel.alpha.coreos.com";

pub fn all(world: &mut World) {
    announced(world);
    networks(world);
    seen(world);
    membership(world);
}

fn annotations(node: &mut Value) -> &mut Value {
    &mut node["metadata"]["annotations"]
}

fn announced(world: &mut World) {
    for key in ["backend-type", "backend-data", "public-ip"] {
        let found = world.case(&N1, &[("NodeNotAnnotatedByFlannel", "Node n1")], |node| {
            annotations(node).as_object_mut().unwrap().remove(&format!("{PREFIX}/{key}"));
        });
        assert!(found[0].what.contains(key), "{found:#?}");
    }
    for (key, value) in
        [("backend-data", "null"), ("backend-data", r#"{"VtepMAC":"8e"}"#), ("public-ip", "::1")]
    {
        let found = world.case(&N1, &[("NodeNotAnnotatedByFlannel", "Node n1")], |node| {
            annotations(node)[format!("{PREFIX}/{key}")] = json!(value);
        });
        assert!(found[0].what.contains(value), "{found:#?}");
    }
    world.case(&N1, &[("BackendNotVxlan", "Node n1")], |node| {
        annotations(node)[format!("{PREFIX}/backend-type")] = json!("host-gw");
    });
    world.case(&N1, &[("AnnotationDiffers", "Node n1")], |node| {
        annotations(node)[format!("{PREFIX}/backend-data")] =
            json!(r#"{"VNI":7,"VtepMAC":"8e:74:9a:30:24:01"}"#);
    });
    world.case(&N1, &[("AnnotationDiffers", "Node n1")], |node| {
        annotations(node)[format!("{PREFIX}/backend-data")] =
            json!(r#"{"VNI":1,"VtepMAC":"8e:74:9a:30:24:99"}"#);
    });
    // Calico would find the node's own address, not that of its twin.
    let twin = [("VtepNotUnique", "Node n2"), ("AutodetectionDiffers", "Node n1")];
    world.case(&N1, &twin, |node| {
        annotations(node)[format!("{PREFIX}/public-ip")] = json!("172.16.0.2");
    });
    world.case(&N1, &[("KeyUnreadable", "Node n1")], |node| {
        annotations(node)["flannel-migration/strategy"] = json!("sideways");
    });
}

/// A third node: the controller manager has no network left for it.
fn networks(world: &mut World) {
    for (own, reason) in [
        (None, "NodeWithoutPodCidr"),
        (Some("10.99.0.0/24"), "PodCidrOutsideNetwork"),
        (Some("10.244.1.128/25"), "PodCidrShared"),
    ] {
        world.join(3, own);
        world.expect(&[(reason, "Node n3")]);
        world.leave(3);
    }
    world.leave(2);
    world.join(2, Some("10.244.1.0/31"));
    world.expect(&[("NodeNetworkTooSmall", "Node n2")]);
    world.leave(2);
    world.join(2, Some(&cidr(2)));
    world.expect_clear();
}

/// Node 1 as its agent would tell it, with a change.
fn told(change: impl FnOnce(&mut Value)) -> impl FnOnce(&mut Value) {
    move |node| {
        let mut host = host(1);
        change(&mut host);
        annotations(node)["flannel-migration/report"] = json!(report(&host));
    }
}

fn seen(world: &mut World) {
    for filter in [0, 2] {
        let found = world.case(
            &N1,
            &[("RpFilterNotStrict", "Node n1")],
            told(|host| host["rpFilter"] = json!(filter)),
        );
        assert!(found[0].remedy.contains("sysctl -w net.ipv4.conf.all.rp_filter=1"), "{found:#?}");
        assert_eq!(found[0].severity, "holds-node");
    }
    world.case(&N1, &[("VxlanDeviceMissing", "Node n1")], told(|host| host["vxlan"] = json!([])));
    world.case(&N1, &[("VxlanDiffers", "Node n1")], told(|host| host["vxlan"][0]["port"] = json!(4789)));
    world.case(&N1, &[("MtuDiffers", "Node n1")], told(|host| host["vxlan"][0]["mtu"] = json!(8951)));
    let storage = json!({ "name": "storage0", "addresses": ["192.168.9.1/24"] });
    let more = told(|host| host["interfaces"].as_array_mut().unwrap().push(storage));
    let original = world.edit(&N1, more);
    let found = world.expect(&[("AutodetectionDiffers", "Node n1")]);
    assert!(found[0].what.contains("192.168.9.1") && found[0].what.contains("172.16.0.1"), "{found:#?}");
    for method in ["kubernetes-internal-ip", "interface=eth.*", "cidr=172.16.0.0/24"] {
        let calico = world.edit(&CALICO, |set| {
            let variables = set["spec"]["template"]["spec"]["containers"][0]["env"].as_array_mut().unwrap();
            variables.push(json!({ "name": "IP_AUTODETECTION_METHOD", "value": method }));
        });
        world.expect_clear();
        world.put(&calico);
    }
    world.put(&original);
    let chained = world.edit(&CALICO_CONFIG, |config| {
        let text = config["data"]["cni_network_config"].as_str().unwrap();
        config["data"]["cni_network_config"] =
            json!(text.replace(r#""type": "bandwidth""#, r#""type": "sbr""#));
    });
    let found = world.expect(&[("CniPluginMissing", "Node n1"), ("CniPluginMissing", "Node n2")]);
    assert!(found[0].what.contains("sbr"), "{found:#?}");
    world.put(&chained);
    world.expect_clear();
}

fn membership(world: &mut World) {
    world.case(&N1, &[("AgentSilent", "Node n1")], |node| {
        node["metadata"]["labels"].as_object_mut().unwrap().remove("flannel-migration/state");
    });
    let mut windows = node(9, Some("10.244.9.0/24"));
    windows["metadata"]["labels"]["kubernetes.io/os"] = json!("windows");
    world.create(&windows);
    world.expect(&[("WindowsNode", "Node n9")]);
    world.leave(9);
    world.leave(2);
    world.create(&node(2, Some(&cidr(2))));
    let mut found = Vec::new();
    // The test's own heart beats in between.
    for _ in 0..10 {
        world.ready(2, "False");
        found = world.look(&[]);
        if !found.is_empty() {
            break;
        }
    }
    assert_eq!((found.len(), found[0].reason.as_str()), (1, "NodeNotReady"), "{found:#?}");
    assert_eq!(found[0].severity, "warning");
    world.ready(2, "True");
    world.expect_clear();
    world.leave(2);
    let found = world.expect_with(DRAIN, &[("SingleNode", "Node n1")]);
    assert_eq!(found[0].severity, "warning");
    world.expect_clear();
    world.leave(1);
    world.expect_with(&[("FLANNEL_MTU", "1450")], &[("NoNodes", "Nodes")]);
    world.join(1, Some(&cidr(1)));
    world.join(2, Some(&cidr(2)));
    world.expect_clear();
}
