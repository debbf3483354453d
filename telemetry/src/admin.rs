//! `/metrics`, `/livez` and `/readyz` over HTTP.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::probes::Probes;

/// Prometheus's own text format, which every scraper reads, and promtool checks.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How soon an address that is taken is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// A client that hasn't sent its request by then is let go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves for ever. An address that is taken is a warning, and is tried again: the work is worth more than its figures.
pub async fn serve(address: SocketAddr, registry: Registry, probes: Probes) -> Infallible {
    let registry = Arc::new(registry);
    let listener = listen(address).await;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: accepting at once would only turn the processor.
                debug!(%error, "connection not accepted");
                sleep(TRY_AGAIN).await;
                continue;
            }
        };
        let (registry, probes) = (Arc::clone(&registry), probes.clone());
        tokio::spawn(async move {
            let answering = service_fn(move |request: Request<Incoming>| {
                let answer = answer(request.method(), request.uri().path(), &registry, &probes);
                std::future::ready(Ok::<_, Infallible>(answer))
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), answering)
                .await;
            if let Err(error) = served {
                debug!(%error, "connection ended");
            }
        });
    }
}

async fn listen(address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!(%address, "serving /metrics, /livez and /readyz");
                return listener;
            }
            Err(error) if !told => {
                told = true;
                warn!(%address, %error, "no metrics and probes: set ADMIN_ADDRESS to an address that is free; tried again");
            }
            Err(_) => {}
        }
        sleep(TRY_AGAIN).await;
    }
}

fn answer(method: &Method, path: &str, registry: &Registry, probes: &Probes) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    let probe = |good: bool| {
        let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let word = if good { "ok" } else { "no" };
        text(status, format!("{word}, last sign of life {} s ago\n", probes.silence().as_secs()))
    };
    match path {
        "/livez" => probe(probes.is_alive()),
        "/readyz" => probe(probes.is_ready()),
        "/metrics" => {
            let mut body = String::new();
            if encode(&mut body, registry).is_err() {
                return text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics can't be written\n".to_owned());
            }
            let mut response = text(StatusCode::OK, text_format(&body));
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(TEXT_FORMAT));
            response
        }
        _ => text(StatusCode::NOT_FOUND, "/metrics, /livez or /readyz\n".to_owned()),
    }
}

/// From `OpenMetrics` to Prometheus's text format: a counter's comments carry its whole name there, and there are neither units nor an end.
fn text_format(open_metrics: &str) -> String {
    let counters: BTreeSet<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let comment = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        match comment.and_then(|rest| rest.split_once(' ')) {
            Some((name, rest)) if counters.contains(name) => {
                let kind = line.get(..7).unwrap_or_default();
                text.push_str(&[kind, name, "_total ", rest].concat());
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::gauge::ConstGauge;
    use prometheus_client::registry::Unit;
    use rstest::rstest;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[rstest]
    #[case("/livez", Method::GET, 200)]
    #[case("/readyz", Method::GET, 503)]
    #[case("/metrics", Method::GET, 200)]
    #[case("/", Method::GET, 404)]
    #[case("/metrics", Method::POST, 405)]
    fn only_what_is_there_is_answered(#[case] path: &str, #[case] method: Method, #[case] status: u16) {
        let probes = Probes::new(Duration::from_mins(1));
        let response = answer(&method, path, &Registry::default(), &probes);
        assert_eq!(response.status(), status);
    }

    #[test]
    fn counters_have_their_whole_name_everywhere() {
        let mut registry = Registry::with_prefix("x");
        let counter = Counter::<u64>::default();
        registry.register_with_unit("waited", "Time", Unit::Seconds, counter.clone());
        registry.register("size", "Bytes", ConstGauge::new(1_i64));
        counter.inc_by(3);
        let mut open_metrics = String::new();
        encode(&mut open_metrics, &registry).unwrap();
        assert_eq!(
            text_format(&open_metrics),
            "# HELP x_waited_seconds_total Time.\n# TYPE x_waited_seconds_total counter\nx_waited_seconds_total 3\n\
             # HELP x_size Bytes.\n# TYPE x_size gauge\nx_size 1\n"
        );
    }

    #[tokio::test]
    async fn metrics_are_served_over_http() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        drop(taken);
        let mut registry = Registry::with_prefix("test");
        registry.register("answers", "The answer to everything", ConstGauge::new(42_i64));
        let server = tokio::spawn(serve(address, registry, Probes::new(Duration::from_mins(1))));
        let mut stream = loop {
            if let Ok(stream) = tokio::net::TcpStream::connect(address).await {
                break stream;
            }
            tokio::task::yield_now().await;
        };
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("test_answers 42"), "{answer}");
        server.abort();
    }
}
