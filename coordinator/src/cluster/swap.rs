//! Writing to one node by compare-and-swap.

use std::sync::Arc;

use kube::api::Api;
use serde_json::{Value, json};

use super::{Node, NodeFacts, Nodes};
use crate::api::{CONFLICT_RETRIES, Error, Result, Writer, found, read};

impl Nodes {
    /// Writes what `patch` says of the node, again and again while others write in between. `None`: the node is gone, or `patch` finds that
    /// nothing is to be written any more.
    ///
    /// What is known of the node already is tried first: the version goes with the write, and the API server refuses what was decided by an
    /// older one. That there is nothing to write is believed only of a node that was read for it.
    ///
    /// # Errors
    ///
    /// The API server refuses or doesn't answer, others keep writing in between, or the leadership is lost.
    pub async fn swap(
        &self,
        writer: &Writer,
        node: &str,
        what: &str,
        patch: impl Fn(&NodeFacts) -> Option<Value>,
    ) -> Result<Option<NodeFacts>> {
        let nodes: Api<Node> = Api::all(writer.client.clone());
        let what = format!("{what} (node {node})");
        let mut known = self.get(node);
        let mut last = None;
        for _ in 0..CONFLICT_RETRIES {
            let (facts, afresh) = match known.take() {
                Some(facts) => (facts, false),
                None => match found(read(what.as_str(), nodes.get(node)).await)? {
                    Some(now) => {
                        // Whoever decides again decides by it, although the watch may be late.
                        let now = NodeFacts::from(&now);
                        self.learnt(now.clone());
                        (Arc::new(now), true)
                    }
                    None => return Ok(None),
                },
            };
            let mut patch = match patch(&facts) {
                Some(patch) => patch,
                None if afresh => return Ok(None),
                None => continue,
            };
            if let Some(metadata) =
                patch.as_object_mut().map(|patch| patch.entry("metadata").or_insert_with(|| json!({})))
            {
                metadata["resourceVersion"] = facts.version.clone().into();
            }
            match writer.merge(what.as_str(), &nodes, node, &patch).await {
                Ok(written) => {
                    let written = NodeFacts::from(&written);
                    self.learnt(written.clone());
                    return Ok(Some(written));
                }
                // Gone since it was known: the next read says so.
                Err(error) if error.is_conflict() || error.is_not_found() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or(Error::Timeout { what }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::{Method, Request, Response};
    use kube::Client;
    use kube::client::Body;

    use super::super::facts::tests::object;
    use super::*;
    use crate::leader::Leadership;

    /// An API server with one node, at a version of its own; `None`: it is gone. A watch tells nothing after the list.
    #[derive(Default)]
    struct Server {
        version: Option<u64>,
        calls: Vec<Method>,
    }

    impl Server {
        fn node(&self) -> (u16, Value) {
            match self.version {
                Some(version) => (200, object("a", &version.to_string())),
                None => {
                    (404, json!({ "kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404 }))
                }
            }
        }

        fn answer(&mut self, method: &Method, body: &[u8]) -> (u16, Value) {
            self.calls.push(method.clone());
            if *method != Method::PATCH {
                return self.node();
            }
            let patch: Value = serde_json::from_slice(body).unwrap();
            if self.version.is_some_and(|now| patch["metadata"]["resourceVersion"] != json!(now.to_string()))
            {
                return (
                    409,
                    json!({ "kind": "Status", "status": "Failure", "reason": "Conflict", "code": 409 }),
                );
            }
            self.version = self.version.map(|now| now + 1);
            self.node()
        }
    }

    async fn cluster() -> (Arc<Mutex<Server>>, Nodes, Writer) {
        let server = Arc::new(Mutex::new(Server { version: Some(7), calls: Vec::new() }));
        let serving = Arc::clone(&server);
        let client = Client::new(
            tower::service_fn(move |request: Request<Body>| {
                let server = Arc::clone(&serving);
                async move {
                    let (parts, body) = request.into_parts();
                    let query = parts.uri.query().unwrap_or_default();
                    if query.contains("watch=true") {
                        std::future::pending::<()>().await;
                    }
                    let body = body.collect_bytes().await.unwrap();
                    let mut server = server.lock().unwrap();
                    let (status, answer) = if parts.uri.path().ends_with("/nodes") {
                        let meta = json!({ "resourceVersion": "7" });
                        (
                            200,
                            json!({ "kind": "NodeList", "apiVersion": "v1", "metadata": meta, "items": [server.node().1] }),
                        )
                    } else {
                        server.answer(&parts.method, &body)
                    };
                    Response::builder().status(status).body(Body::from(answer.to_string().into_bytes()))
                }
            }),
            "default",
        );
        let nodes = Nodes::watch(client.clone()).await.unwrap();
        (server, nodes, Writer::new(client, Leadership::held_for_ever(), None))
    }

    #[allow(clippy::unnecessary_wraps, reason = "as `swap` asks for it")]
    fn label(_: &NodeFacts) -> Option<Value> {
        Some(json!({ "metadata": { "labels": { "a": "b" } } }))
    }

    fn calls(server: &Mutex<Server>) -> Vec<Method> {
        std::mem::take(&mut server.lock().unwrap().calls)
    }

    #[tokio::test]
    async fn what_is_known_is_written_by_without_reading() {
        let (server, nodes, writer) = cluster().await;
        for version in ["8", "9"] {
            let written = nodes.swap(&writer, "a", "label", label).await.unwrap().unwrap();
            assert_eq!(written.version, version);
            assert_eq!(calls(&server), [Method::PATCH]);
        }
    }

    #[tokio::test]
    async fn what_was_decided_by_an_older_version_is_refused_and_decided_anew() {
        let (server, nodes, writer) = cluster().await;
        server.lock().unwrap().version = Some(20);
        let written = nodes.swap(&writer, "a", "label", label).await.unwrap().unwrap();
        assert_eq!(written.version, "21");
        assert_eq!(calls(&server), [Method::PATCH, Method::GET, Method::PATCH]);

        server.lock().unwrap().version = Some(30);
        let never_of_30 = |now: &NodeFacts| (now.version != "30").then(|| label(now)).flatten();
        assert!(nodes.swap(&writer, "a", "label", never_of_30).await.unwrap().is_none());
        assert_eq!(nodes.get("a").unwrap().version, "30", "what was read is known");
        assert_eq!(calls(&server), [Method::PATCH, Method::GET]);
    }

    #[tokio::test]
    async fn that_nothing_is_to_be_written_is_read_first() {
        let (server, nodes, writer) = cluster().await;
        server.lock().unwrap().version = Some(20);
        let only_of_20 = |now: &NodeFacts| (now.version == "20").then(|| label(now)).flatten();
        assert!(nodes.swap(&writer, "a", "label", only_of_20).await.unwrap().is_some());
        assert_eq!(calls(&server), [Method::GET, Method::PATCH]);
        assert!(nodes.swap(&writer, "a", "label", |_| None).await.unwrap().is_none());
        assert_eq!(calls(&server), [Method::GET]);
    }

    #[tokio::test]
    async fn a_node_that_is_gone_is_no_error() {
        let (server, nodes, writer) = cluster().await;
        server.lock().unwrap().version = None;
        assert!(nodes.swap(&writer, "a", "label", label).await.unwrap().is_none());
        assert_eq!(calls(&server), [Method::PATCH, Method::GET]);
        assert!(nodes.swap(&writer, "unknown", "label", label).await.unwrap().is_none());
        assert_eq!(calls(&server), [Method::GET]);
    }
}
