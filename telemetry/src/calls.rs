//! Counts calls to the API server, underneath the client: what is counted is what was sent.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tower_layer::Layer;
use tower_service::Service;

/// What distinguishes calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    /// HTTP's method.
    pub method: String,
    /// HTTP's status, or `error` when there was no answer.
    pub code: String,
}

/// Counts the calls of every client that it is a layer of.
#[derive(Clone, Debug, Default)]
pub struct CountCalls {
    calls: Family<Call, Counter>,
}

impl CountCalls {
    /// Registers `api_calls_total`.
    #[must_use]
    pub fn registered(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "api_calls",
            "Calls to the API server by HTTP method and status",
            this.calls.clone(),
        );
        this
    }

    /// How many calls of this kind there were.
    #[must_use]
    pub fn count(&self, call: &Call) -> u64 {
        self.calls.get(call).map_or(0, |counter| counter.get())
    }
}

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, calls: self.calls.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    calls: Family<Call, Counter>,
}

impl<S, B, A> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<A>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = request.method().to_string();
        let calls = self.calls.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer
                .as_ref()
                .map_or_else(|_| "error".to_owned(), |answer| answer.status().as_str().to_owned());
            calls.get_or_create(&Call { method, code }).inc();
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Answer(Option<u16>);

    impl Service<Request<()>> for Answer {
        type Response = Response<()>;
        type Error = ();
        type Future = std::future::Ready<Result<Response<()>, ()>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::ready(match self.0 {
                Some(code) => Ok(Response::builder().status(code).body(()).unwrap()),
                None => Err(()),
            })
        }
    }

    #[tokio::test]
    async fn answered_and_unanswered_calls_are_counted_apart() {
        let counting = CountCalls::default();
        for answer in [Some(200), Some(200), Some(409), None] {
            let _ = counting.layer(Answer(answer)).call(Request::get("/").body(()).unwrap()).await;
        }
        for (code, count) in [("200", 2), ("409", 1), ("error", 1), ("404", 0)] {
            let call = Call { method: "GET".to_owned(), code: code.to_owned() };
            assert_eq!(counting.count(&call), count, "{code}");
        }
    }
}
