//! An API server that holds the objects of some manifests, and answers what is read of them.

use flannel_migration_tests::parts;
use http::{Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};

/// Kubernetes' own kinds that a survey reads.
const KINDS: [(&str, &str); 5] = [
    ("daemonsets", "DaemonSet"),
    ("configmaps", "ConfigMap"),
    ("services", "Service"),
    ("secrets", "Secret"),
    ("jobs", "Job"),
];

/// flannel's own stock manifest.
pub fn flannel() -> Vec<Value> {
    documents(&parts::manifests::stock(&parts::stacks::FLANNEL, "kube-flannel.yml").unwrap())
}

pub fn documents(text: &str) -> Vec<Value> {
    flannel_migration_tests::bed::flannel::documents(text).unwrap()
}

/// A client of a server to which these objects were applied, in this order.
pub fn client(objects: &[Value]) -> Client {
    let mut all = vec![json!({
        "kind": "Service", "metadata": { "name": "kubernetes", "namespace": "default" },
        "spec": { "clusterIP": "10.96.0.1", "ports": [{ "port": 443 }] },
    })];
    for object in objects {
        let identity = |object: &Value| {
            (
                object["kind"].clone(),
                object["metadata"]["namespace"].clone(),
                object["metadata"]["name"].clone(),
            )
        };
        all.retain(|other| identity(other) != identity(object));
        all.push(object.clone());
    }
    let service = tower::service_fn(move |request: Request<Body>| {
        let (status, body) = match answer(&all, request.uri().path()) {
            Some(body) => (200, body),
            None => (
                404,
                json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404 }),
            ),
        };
        std::future::ready(Response::builder().status(status).body(Body::from(body.to_string().into_bytes())))
    });
    Client::new(service, "default")
}

fn answer(objects: &[Value], path: &str) -> Option<Value> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts.as_slice() {
        ["version"] => Some(json!({
            "major": "1", "minor": "34", "gitVersion": "v1.34.4", "gitCommit": "", "gitTreeState": "", "buildDate": "",
            "goVersion": "", "compiler": "", "platform": "",
        })),
        ["apis"] => Some(groups(objects)),
        ["api", "v1", rest @ ..] => resource(objects, "", rest),
        ["apis", group, _, rest @ ..] => resource(objects, group, rest),
        _ => None,
    }
}

fn definitions(objects: &[Value]) -> impl Iterator<Item = &Value> {
    objects.iter().filter(|object| object["kind"] == "CustomResourceDefinition")
}

fn groups(objects: &[Value]) -> Value {
    let mut names: Vec<&str> =
        definitions(objects).map(|object| object["spec"]["group"].as_str().unwrap()).collect();
    names.sort_unstable();
    names.dedup();
    let group = |name: &&str| json!({ "name": name, "versions": [] });
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": names.iter().map(group).collect::<Vec<_>>() })
}

fn resource(objects: &[Value], group: &str, rest: &[&str]) -> Option<Value> {
    let (namespace, plural, name) = match rest {
        ["namespaces", namespace, plural, name] => (Some(*namespace), *plural, Some(*name)),
        [plural] => (None, *plural, None),
        [plural, name] => (None, *plural, Some(*name)),
        _ => return None,
    };
    let custom = definitions(objects)
        .find(|object| object["spec"]["group"] == group && object["spec"]["names"]["plural"] == plural)
        .and_then(|object| object["spec"]["names"]["kind"].as_str());
    let kind = custom.or_else(|| KINDS.iter().find(|(known, _)| *known == plural).map(|(_, kind)| *kind))?;
    let mut of_kind = objects.iter().filter(|object| {
        object["kind"] == kind
            && namespace.is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
    });
    if name.is_some() {
        return of_kind.find(|object| object["metadata"]["name"].as_str() == name).cloned();
    }
    let items: Vec<&Value> = of_kind.collect();
    Some(json!({ "kind": format!("{kind}List"), "apiVersion": "v1", "metadata": {}, "items": items }))
}
