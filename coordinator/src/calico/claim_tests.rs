//! What is written, counted and cut off anywhere, against an API server that holds objects and their versions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use flannel_migration_protocol::Adopted;
use http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::api::Writer;
use crate::leader::Leadership;

#[derive(Default)]
struct Server {
    /// By resource and name.
    objects: BTreeMap<String, Value>,
    version: u64,
    reads: usize,
    writes: Vec<String>,
    /// So many writes are done, the others are refused.
    budget: Option<usize>,
}

impl Server {
    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> (u16, Value) {
        let refused = |code: u16, reason: &str| {
            (code, json!({ "kind": "Status", "status": "Failure", "reason": reason, "code": code }))
        };
        let path = path.trim_start_matches("/apis/crd.projectcalico.org/v1/");
        if *method == Method::GET {
            if !path.contains('/') {
                let prefix = format!("{path}/");
                let items =
                    self.objects.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
                return (
                    200,
                    json!({ "metadata": {}, "items": items.map(|(_, object)| object).collect::<Vec<_>>() }),
                );
            }
            self.reads += 1;
            return self
                .objects
                .get(path)
                .map_or_else(|| refused(404, "NotFound"), |found| (200, found.clone()));
        }
        let mut object: Value = serde_json::from_slice(body).unwrap();
        let key = match *method {
            Method::POST => format!("{path}/{}", object["metadata"]["name"].as_str().unwrap()),
            _ => path.to_owned(),
        };
        if self.budget == Some(self.writes.len()) {
            return refused(503, "ServiceUnavailable");
        }
        self.version += 1;
        let (word, now) = (method.as_str().to_lowercase(), self.objects.get(&key).cloned());
        let said = match *method {
            Method::DELETE => object["preconditions"]["resourceVersion"].clone(),
            _ => object["metadata"]["resourceVersion"].clone(),
        };
        match now {
            Some(_) if *method == Method::POST => return refused(409, "AlreadyExists"),
            None if *method != Method::POST => return refused(404, "NotFound"),
            Some(now) if now["metadata"]["resourceVersion"] != said => return refused(409, "Conflict"),
            _ => {}
        }
        self.writes.push(format!("{word} {}", key.split('/').next().unwrap()));
        if *method == Method::DELETE {
            self.objects.remove(&key);
            return (200, json!({ "kind": "Status", "status": "Success" }));
        }
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(key, object.clone());
        (200, object)
    }
}

#[derive(Clone, Default)]
struct Api(Arc<Mutex<Server>>);

impl Api {
    fn client(&self) -> Client {
        let server = Arc::clone(&self.0);
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = Arc::clone(&server);
            async move {
                let (method, path) = (request.method().clone(), request.uri().path().to_owned());
                let body = request.into_body().collect_bytes().await.unwrap();
                let (status, answer) = server.lock().unwrap().answer(&method, &path, &body);
                Response::builder().status(status).body(Body::from(answer.to_string().into_bytes()))
            }
        });
        Client::new(service, "default")
    }

    fn ipam(&self) -> Ipam {
        Ipam::new(Writer::new(self.client(), Leadership::held_for_ever(), None))
    }

    async fn claim(&self) -> Result<(), Error> {
        let stock = Stock::read(&self.client()).await?;
        self.ipam().claim("a", &blocks(), "10.0.0.0".parse().unwrap(), &stock).await
    }

    /// Writes by kind, and reads of single objects, since the last call.
    fn calls(&self) -> (BTreeMap<String, usize>, usize) {
        let mut server = self.0.lock().unwrap();
        server.budget = None;
        let mut counts = BTreeMap::new();
        for write in std::mem::take(&mut server.writes) {
            *counts.entry(write).or_insert(0) += 1;
        }
        (counts, std::mem::take(&mut server.reads))
    }

    fn specs(&self) -> BTreeMap<String, Value> {
        let server = self.0.lock().unwrap();
        let spec = |object: &Value| {
            let mut spec = object["spec"].clone();
            // Of the time of their making.
            for field in ["sequenceNumber", "sequenceNumberForAllocation"] {
                spec.as_object_mut().unwrap().remove(field);
            }
            for attributes in spec["attributes"].as_array_mut().into_iter().flatten() {
                attributes["secondary"].as_object_mut().unwrap().remove("timestamp");
            }
            spec
        };
        server.objects.iter().map(|(key, object)| (key.clone(), spec(object))).collect()
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn blocks() -> Vec<IpNet> {
    net("10.0.0.0/24").subnets(26).unwrap().collect()
}

fn counts(counts: &[(&str, usize)]) -> BTreeMap<String, usize> {
    counts.iter().map(|(call, count)| ((*call).to_owned(), *count)).collect()
}

#[tokio::test]
async fn each_object_of_a_node_is_written_once_and_unseen_and_then_never_again() {
    let api = Api::default();
    api.claim().await.unwrap();
    let once = [("post blockaffinities", 4), ("post ipamblocks", 4), ("post ipamhandles", 1)];
    assert_eq!(api.calls(), (counts(&once), 0));
    let specs = api.specs();
    let device = &specs["ipamblocks/10-0-0-0-26"];
    assert_eq!(device["allocations"][0], 0);
    assert_eq!(device["attributes"][0]["handle_id"], "vxlan-tunnel-addr-a");
    assert_eq!(specs["ipamhandles/vxlan-tunnel-addr-a"]["block"], json!({ "10.0.0.0/26": 1 }));
    assert_eq!(specs["blockaffinities/a-10-0-0-192-26"]["state"], "confirmed");
    api.claim().await.unwrap();
    assert_eq!(api.calls(), (BTreeMap::new(), 0));
    // Also by one who hasn't looked at all of it before.
    api.ipam().claim("a", &blocks(), "10.0.0.0".parse().unwrap(), &Stock::default()).await.unwrap();
    assert!(api.calls().0.is_empty());
    assert_eq!(api.specs(), specs);
}

#[tokio::test]
async fn a_claim_that_ended_anywhere_is_completed_by_the_next_one() {
    let whole = Api::default();
    whole.claim().await.unwrap();
    for done in 0..9 {
        for looked in [true, false] {
            let api = Api::default();
            api.0.lock().unwrap().budget = Some(done);
            assert!(api.claim().await.is_err(), "{done}");
            let specs = api.specs();
            for key in specs.keys().filter_map(|key| key.strip_prefix("blockaffinities/a-")) {
                assert!(specs.contains_key(&format!("ipamblocks/{key}")), "an affinity without its block");
            }
            api.calls();
            // What was known before the first try may be out of date by the second.
            let stock = if looked { Stock::read(&api.client()).await.unwrap() } else { Stock::default() };
            api.ipam().claim("a", &blocks(), "10.0.0.0".parse().unwrap(), &stock).await.unwrap();
            assert_eq!(api.calls().0.values().sum::<usize>(), 9 - done, "{done} {looked}");
            assert_eq!(api.specs(), whole.specs(), "{done}");
        }
    }
}

#[tokio::test]
async fn what_was_made_meanwhile_is_found_and_what_is_half_made_is_completed() {
    let (api, whole) = (Api::default(), Api::default());
    let before = Stock::read(&api.client()).await.unwrap();
    api.claim().await.unwrap();
    whole.claim().await.unwrap();
    api.calls();
    api.ipam().claim("a", &blocks(), "10.0.0.0".parse().unwrap(), &before).await.unwrap();
    assert!(api.calls().0.is_empty());
    {
        let mut server = api.0.lock().unwrap();
        server.objects.get_mut("blockaffinities/a-10-0-0-0-26").unwrap()["spec"]["state"] = json!("pending");
        server.objects.get_mut("blockaffinities/a-10-0-0-64-26").unwrap()["spec"]["deleted"] = json!("true");
        server.objects.get_mut("ipamblocks/10-0-0-128-26").unwrap()["spec"]["deleted"] = json!(true);
        server.objects.get_mut("ipamhandles/vxlan-tunnel-addr-a").unwrap()["spec"]["block"] = json!({});
    }
    api.claim().await.unwrap();
    assert_eq!(api.specs(), whole.specs());
}

#[tokio::test]
async fn a_block_of_anothers_is_left_alone_and_gets_no_affinity() {
    let api = Api::default();
    api.claim().await.unwrap();
    api.calls();
    let stock = Stock::read(&api.client()).await.unwrap();
    let claimed = api.ipam().claim("b", &blocks(), "10.0.0.0".parse().unwrap(), &stock).await;
    assert!(matches!(claimed, Err(Error::NotOurs { .. })), "{claimed:?}");
    assert!(api.calls().0.is_empty());
}

#[tokio::test]
async fn addresses_taken_over_are_one_write_of_their_block_and_one_handle_each() {
    let api = Api::default();
    api.claim().await.unwrap();
    let free = api.specs();
    api.calls();
    let pod = |number: u8| Adopted {
        sandbox: format!("s{number}"),
        ip: vec![[10, 0, 0, number].into()],
        namespace: "default".into(),
        pod: format!("p{number}"),
        uid: String::new(),
    };
    let (pods, kept) = ([pod(5), pod(6), pod(70)], ["10.0.0.1".parse().unwrap()]);
    api.ipam().register("a", &blocks(), &pods, &kept).await.unwrap();
    assert_eq!(api.calls(), (counts(&[("post ipamhandles", 4), ("put ipamblocks", 2)]), 2));
    let registered = api.specs();
    api.ipam().register("a", &blocks(), &pods, &kept).await.unwrap();
    assert!(api.calls().0.is_empty());
    assert_eq!(api.specs(), registered);
    api.ipam().release_kept().await.unwrap();
    assert_eq!(api.calls().0, counts(&[("delete ipamhandles", 1), ("put ipamblocks", 1)]));
    assert_eq!(api.ipam().release_pods("a", &[net("10.0.0.0/24")], &blocks()).await.unwrap(), 3);
    assert_eq!(api.calls().0, counts(&[("delete ipamhandles", 3), ("put ipamblocks", 2)]));
    let sorted = |mut specs: BTreeMap<String, Value>| {
        for spec in specs.values_mut().filter_map(|spec| spec["unallocated"].as_array_mut()) {
            spec.sort_by_key(Value::as_u64);
        }
        specs
    };
    assert_eq!(sorted(api.specs()), sorted(free));
    for block in &blocks() {
        api.ipam().disclaim("a", block).await.unwrap();
    }
    assert!(api.specs().is_empty());
}

#[tokio::test]
async fn of_ipv6_a_node_gets_a_device_of_its_own_and_more_blocks_when_its_pods_need_them() {
    let api = Api::default();
    let (share, ipam) = (net("fd00:0:0:1::/64"), api.ipam());
    let blocks: Vec<IpNet> = ["fd00:0:0:1::/122", "fd00:0:0:1::40/122"].map(net).into();
    let stock = Stock::read(&api.client()).await.unwrap();
    ipam.claim("a", &blocks, "fd00:0:0:1::".parse().unwrap(), &stock).await.unwrap();
    let once = [("post blockaffinities", 2), ("post ipamblocks", 2), ("post ipamhandles", 1)];
    assert_eq!(api.calls(), (counts(&once), 0));
    let specs = api.specs();
    let device = &specs["ipamblocks/fd00-0-0-1---122"]["attributes"][0];
    assert_eq!(device["handle_id"], "vxlan-v6-tunnel-addr-a");
    assert_eq!(device["secondary"], json!({ "node": "a", "type": "vxlanV6TunnelAddress" }));
    {
        let server = api.0.lock().unwrap();
        let labels = &server.objects["blockaffinities/a-fd00-0-0-1---122"]["metadata"]["labels"];
        assert_eq!(labels["projectcalico.org/ip-version"], "6");
    }

    let far = [net("fd00:0:0:1::1000/122")];
    ipam.claim_more("a", &[blocks.clone(), far.to_vec()].concat()).await.unwrap();
    assert_eq!(api.calls().0, counts(&[("post blockaffinities", 1), ("post ipamblocks", 1)]));
    let before = api.specs();
    let pod = Adopted {
        sandbox: "s".into(),
        ip: vec!["fd00:0:0:1::1003".parse().unwrap()],
        namespace: "default".into(),
        pod: "p".into(),
        uid: String::new(),
    };
    ipam.register("a", &far, std::slice::from_ref(&pod), &[]).await.unwrap();
    api.calls();
    // The block isn't among those that are looked at in any case: the handle names it.
    let released = ipam.release_pods("a", &[share], &blocks).await.unwrap();
    assert_eq!((released, api.calls().0), (1, counts(&[("delete ipamhandles", 1), ("put ipamblocks", 1)])));
    assert_eq!(api.specs().len(), before.len());
    let stock = Stock::read(&api.client()).await.unwrap();
    for block in &stock.by_node(&[net("fd00::/48")])["a"] {
        ipam.disclaim("a", block).await.unwrap();
    }
    assert!(api.specs().is_empty());
}
