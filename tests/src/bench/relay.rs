//! A way to the API server that counts the bytes that pass, for one client alone.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// Bytes that have passed, as on the wire: encrypted.
#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
}

/// Relays connections from a free loopback port until it is dropped.
pub struct Relay {
    counts: Arc<Counts>,
    port: u16,
    _runtime: Runtime,
}

impl Relay {
    /// Relays to this port of the loopback address.
    pub fn start(to: u16) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener =
            runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).context("no loopback port")?;
        let port = listener.local_addr()?.port();
        let counts: Arc<Counts> = Arc::default();
        let shared = Arc::clone(&counts);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // The API server may be down: then this client is refused.
                if let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await {
                    let counts = Arc::clone(&shared);
                    tokio::spawn(async move { join(client, server, &counts).await });
                }
            }
        });
        Ok(Self { counts, port, _runtime: runtime })
    }

    /// Where it listens.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that the client has sent and received.
    #[must_use]
    pub fn passed(&self) -> (u64, u64) {
        (self.counts.sent.load(Ordering::Relaxed), self.counts.received.load(Ordering::Relaxed))
    }
}

async fn join(client: TcpStream, server: TcpStream, counts: &Counts) {
    // Small requests would wait for the answers to the ones before.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    futures::future::join(
        copy(from_client, to_server, &counts.sent),
        copy(from_server, to_client, &counts.received),
    )
    .await;
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, passed: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer).await {
        let Some(part) = buffer.get(..read).filter(|part| !part.is_empty()) else { break };
        if to.write_all(part).await.is_err() {
            break;
        }
        passed.fetch_add(u64::try_from(read).unwrap_or(0), Ordering::Relaxed);
    }
    // However it ends, the other side learns that nothing more will come.
    let _ = to.shutdown().await;
}
