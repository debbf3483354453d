//! A connection that the node itself holds to one of its pods, from the bridge's address as the kernel chooses it.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use flannel_migration_agent::host::netns;

use super::{Pod, World};

pub struct Connection {
    client: TcpStream,
    server: TcpStream,
}

impl World {
    pub fn connect(&self, pod: &Pod, address: IpAddr) -> Connection {
        Self::connect_from(&self.node(), pod, address)
    }

    pub fn connect_from(from: &str, pod: &Pod, address: IpAddr) -> Connection {
        let listener = netns::run(&Path::new("/run/netns").join(&pod.netns), || {
            TcpListener::bind((address, 0)).unwrap()
        })
        .unwrap();
        let port = listener.local_addr().unwrap().port();
        let client =
            netns::run(&Path::new("/run/netns").join(from), || TcpStream::connect((address, port)).unwrap())
                .unwrap();
        let (server, _) = listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        Connection { client, server }
    }
}

impl Connection {
    /// A word each way.
    pub fn talk(&mut self) {
        let mut word = [0; 4];
        self.client.write_all(b"ping").unwrap();
        self.server.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"ping");
        self.server.write_all(b"pong").unwrap();
        self.client.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"pong");
    }

    pub fn source(&self) -> String {
        self.client.local_addr().unwrap().ip().to_string()
    }
}
