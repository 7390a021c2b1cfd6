//! The hospital's servers: they greet, so that an answer proves the way there and back.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context, Result};

use super::topology::{self, HOSTS};

/// What is printed when every server listens.
pub const READY: &str = "ready";

/// Serves every host's ports until killed.
pub fn run() -> Result<()> {
    for host in HOSTS {
        for port in host.tcp {
            // An IPv6 wildcard socket takes IPv4 as well.
            let listener = topology::inside(host.name, || {
                TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port))
            })?
            .with_context(|| format!("{} cannot listen on tcp/{port}", host.name))?;
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    thread::spawn(move || talk(host.name, stream));
                }
            });
        }
        for port in host.udp {
            let socket = topology::inside(host.name, || {
                UdpSocket::bind((Ipv6Addr::UNSPECIFIED, *port))
            })?
            .with_context(|| format!("{} cannot listen on udp/{port}", host.name))?;
            thread::spawn(move || {
                let mut packet = [0; 64];
                while let Ok((_, from)) = socket.recv_from(&mut packet) {
                    // The client may be gone; the next one may not.
                    let _ = socket.send_to(host.name.as_bytes(), from);
                }
            });
        }
    }
    println!("{READY}");
    loop {
        thread::park();
    }
}

/// Greets, then sends every line back. Ends with the connection.
fn talk(name: &str, mut stream: TcpStream) -> Option<()> {
    writeln!(stream, "{name}").ok()?;
    let lines = BufReader::new(stream.try_clone().ok()?).lines();
    for line in lines.map_while(Result::ok) {
        writeln!(stream, "{line}").ok()?;
    }
    Some(())
}
