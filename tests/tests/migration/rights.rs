//! Every right that is granted is used, and every one that is used is granted: by the audit log of a whole migration.

use std::{collections::BTreeSet, fs, path::Path};

use flannel_migration_tests::bed::{Bed, flannel::documents};
use serde_json::Value;

use super::{AGENT, CONTROLLER};

/// Verb, API group, resource.
type Right = (String, String, String);

/// Rights that the run above has no use for: whose, verb, resource, why they are granted all the same.
const UNUSED: &[(&str, &str, &str, &str)] = &[
    (
        CONTROLLER,
        "create",
        "daemonsets",
        "pulls Calico's images where they are missing; a test bed's nodes have them",
    ),
    (CONTROLLER, "patch", "events", "what happens again is counted in the event that is there"),
    (CONTROLLER, "patch", "felixconfigurations", "one that is there already is completed"),
    (CONTROLLER, "delete", "felixconfigurations", "with Canal, a node's own is made and removed"),
    (CONTROLLER, "get", "ippools", "Canal's pool is looked at, and a rollback's"),
    (CONTROLLER, "patch", "ippools", "Canal's pool becomes the cluster's"),
    (CONTROLLER, "delete", "ippools", "Canal's pool of another network makes room"),
    (CONTROLLER, "get", "blockaffinities", "one that isn't as it must be is looked at"),
    (CONTROLLER, "update", "blockaffinities", "one that is pending is confirmed"),
    (CONTROLLER, "delete", "blockaffinities", "one that is marked as deleted makes room"),
    (CONTROLLER, "delete", "ipamblocks", "one that is marked as deleted makes room"),
    (CONTROLLER, "get", "ipamhandles", "one that is there already is looked at"),
    (CONTROLLER, "list", "ipamhandles", "a node that goes back to flannel gives its pods' addresses back"),
    (CONTROLLER, "update", "ipamhandles", "as above"),
    (CONTROLLER, "delete", "ipamhandles", "as above"),
    (CONTROLLER, "patch", "jobs", "an abort or a rollback ends by suspending the Job"),
    (CONTROLLER, "delete", "ippools", "a rollback of the cluster takes the pool back"),
    (AGENT, "patch", "events", "what happens again is counted in the event that is there"),
];

fn granted(account: &str) -> BTreeSet<Right> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/migration-job.yaml");
    let objects = documents(&fs::read_to_string(file).unwrap()).unwrap();
    let roles = objects.iter().filter(|object| {
        ["Role", "ClusterRole"].contains(&object["kind"].as_str().unwrap())
            && object["metadata"]["name"] == account
    });
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in roles.flat_map(|role| role["rules"].as_array().unwrap()) {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rights.insert((verb, group.clone(), resource.clone()));
                }
            }
        }
    }
    rights
}

/// What the audit log says that an account did; and what it was refused.
fn used(bed: &Bed, account: &str) -> (BTreeSet<Right>, Vec<String>) {
    let user = format!("system:serviceaccount:kube-system:{account}");
    let text = fs::read_to_string(bed.plan.directory().join("control/audit.log")).unwrap();
    let (mut rights, mut refused) = (BTreeSet::new(), Vec::new());
    for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        if event["user"]["username"] != user.as_str() || event["objectRef"].is_null() {
            continue;
        }
        let of = |key: &str| event["objectRef"][key].as_str().unwrap_or_default().to_owned();
        let resource = match of("subresource").as_str() {
            "" => of("resource"),
            subresource => format!("{}/{subresource}", of("resource")),
        };
        let verb = event["verb"].as_str().unwrap().to_owned();
        if event["responseStatus"]["code"] == 403 {
            refused.push(format!("{account}: {verb} {resource}: {}", event["responseStatus"]["message"]));
        } else {
            rights.insert((verb, of("apiGroup"), resource));
        }
    }
    (rights, refused)
}

pub fn expect_rights_used(bed: &Bed) {
    let mut wrong = Vec::new();
    for (whose, verb, resource, _) in UNUSED {
        let is_granted = granted(whose).iter().any(|(v, _, r)| (v.as_str(), r.as_str()) == (verb, resource));
        if !is_granted {
            wrong.push(format!("{whose}: {verb} {resource} is excused and not granted"));
        }
    }
    for account in [CONTROLLER, AGENT] {
        let (used, refused) = used(bed, account);
        wrong.extend(refused);
        for (verb, group, resource) in granted(account).difference(&used) {
            let known = UNUSED.iter().any(|(whose, v, r, _)| (*whose, *v, *r) == (account, verb, resource));
            if !known {
                wrong.push(format!("{account} never used: {verb} {resource}.{group}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
