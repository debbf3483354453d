//! Findings about Calico, and about what is in its datastore.

use serde_json::{Value, json};

use super::world::{CALICO, CALICO_CONFIG, World};

const DAEMON: &str = "DaemonSet kube-system/calico-node";
const WAITS: &str = "projectcalico.org/node-network-during-migration";

fn spec(set: &mut Value) -> &mut Value {
    &mut set["spec"]["template"]["spec"]
}

fn set_variable(container: &mut Value, name: &str, value: &str) {
    let variables = container["env"].as_array_mut().unwrap();
    variables.retain(|variable| variable["name"] != name);
    variables.push(json!({ "name": name, "value": value }));
}

pub fn all(world: &mut World) {
    absent(world);
    daemon(world);
    datastore(world);
    in_use(world);
}

fn absent(world: &mut World) {
    world.kubectl(&["-n", "kube-system", "delete", "daemonset", "calico-node"]);
    world.expect(&[("CalicoNotFound", DAEMON)]);
    world.bed().apply_calico().unwrap();
    world.expect_clear();

    let pools = "ippools.crd.projectcalico.org";
    let mut newer = world.bed().get(&["customresourcedefinition", pools]).unwrap();
    world.kubectl(&["delete", "customresourcedefinition", pools]);
    world.expect(&[("CalicoDefinitionsMissing", "CustomResourceDefinition ippools.crd.projectcalico.org")]);
    newer["metadata"] = json!({
        "name": "ippools.projectcalico.org",
        // Kubernetes asks who may use a group under its own names.
        "annotations": { "api-approved.kubernetes.io": "unapproved, test" },
    });
    newer["spec"]["group"] = json!("projectcalico.org");
    world.create(&newer);
    world.expect(&[("CalicoDatastoreGroup", "CustomResourceDefinition ippools.projectcalico.org")]);
    world.kubectl(&["delete", "customresourcedefinition", "ippools.projectcalico.org"]);
    world.bed().apply_calico().unwrap();
    world.expect_clear();
}

fn daemon(world: &mut World) {
    world.case(&CALICO, &[("CalicoDoesNotWait", DAEMON)], |set| {
        spec(set)["nodeSelector"] = json!({ "somewhere": "else" });
    });
    world.case(&CALICO, &[("CalicoRunsAlready", DAEMON)], |set| {
        spec(set)["nodeSelector"].as_object_mut().unwrap().remove(WAITS);
    });
    world.case(&CALICO, &[("CalicoTooOld", DAEMON)], |set| {
        spec(set)["containers"][0]["image"] = json!("docker.io/calico/node:v3.22.5");
    });
    world.case(&CALICO, &[("CalicoInEtcd", DAEMON)], |set| {
        set_variable(&mut spec(set)["containers"][0], "DATASTORE_TYPE", "etcdv3");
    });
    world.case(&CALICO, &[("CalicoManifestUnusable", DAEMON)], |set| {
        let installers = spec(set)["initContainers"].as_array_mut().unwrap();
        let installer = installers.iter_mut().find(|container| container["name"] == "install-cni").unwrap();
        installer["env"].as_array_mut().unwrap().retain(|variable| variable["name"] != "CNI_CONF_NAME");
    });
    world.case(
        &CALICO_CONFIG,
        &[("CalicoManifestUnusable", "ConfigMap kube-system/calico-config")],
        |config| {
            let text =
                config["data"]["cni_network_config"].as_str().unwrap().replace("calico-ipam", "host-local");
            config["data"]["cni_network_config"] = json!(text);
        },
    );
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "crd.projectcalico.org/v1", "kind": kind, "metadata": { "name": name }, "spec": spec })
}

fn datastore(world: &mut World) {
    let pool = |cidr: &str, vxlan: &str| {
        json!({
            "cidr": cidr, "blockSize": 26, "natOutgoing": true, "ipipMode": "Never", "vxlanMode": vxlan,
            "nodeSelector": "all()", "allowedUses": ["Workload", "Tunnel"],
        })
    };
    for (object, reason) in [
        (object("IPPool", "default-ipv4-ippool", &pool("10.244.0.0/23", "Never")), "PoolDiffers"),
        (object("IPPool", "mine", &pool("10.244.0.0/16", "Always")), "PoolOverlaps"),
        (
            object(
                "IPAMBlock",
                "10-244-1-64-26",
                &json!({
                    "cidr": "10.244.1.64/26", "affinity": "host:n9", "allocations": [], "unallocated": [],
                    "attributes": [], "strictAffinity": false, "deleted": false,
                }),
            ),
            "BlockOfAnotherNode",
        ),
        (object("FelixConfiguration", "default", &json!({ "bpfEnabled": true })), "CalicoEbpf"),
    ] {
        world.create(&object);
        let (kind, name) = (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
        world.expect(&[(reason, &format!("{kind} {name}"))]);
        world.kubectl(&["delete", &format!("{}.crd.projectcalico.org", kind.to_lowercase()), name]);
        world.expect_clear();
    }
}

/// What Calico's nodes use must not change under them.
fn in_use(world: &mut World) {
    world.create(&object("FelixConfiguration", "default", &json!({ "vxlanVNI": 4096 })));
    world.expect_clear();
    world.kubectl(&["label", "node", "n2", &format!("{WAITS}=calico")]);
    let found = world.expect(&[("FelixConfigurationDiffers", "FelixConfiguration default")]);
    let needed = found[0].what.split_once("needed is ").unwrap().1.split_once(", but").unwrap().0;
    let patch = json!({ "spec": serde_json::from_str::<Value>(needed).unwrap() });
    let felix = "felixconfiguration.crd.projectcalico.org";
    world.kubectl(&["patch", felix, "default", "--type=merge", "-p", &patch.to_string()]);
    world.expect_clear();
    world.kubectl(&["label", "node", "n2", &format!("{WAITS}-")]);
    world.kubectl(&["delete", felix, "default"]);
    world.expect_clear();
}
