//! Accepts connections, and ends them with the server.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::locked;

/// Accepts connections and gives each a thread; on drop it stops, and its connections are shut down.
pub(crate) struct Acceptor {
    /// Where it listens.
    pub address: SocketAddr,
    open: Arc<Open>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Open {
    stopping: AtomicBool,
    /// By the address of the peer.
    streams: Mutex<BTreeMap<SocketAddr, TcpStream>>,
}

impl Acceptor {
    /// Listens on 127.0.0.1 and runs `serve` on each connection; it is closed when `serve` returns.
    ///
    /// # Errors
    /// The port is taken.
    pub(crate) fn start(
        port: u16,
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        let address = listener.local_addr()?;
        let open = Arc::new(Open::default());
        let (accepting, serve) = (Arc::clone(&open), Arc::new(serve));
        let thread = thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                if accepting.stopping.load(Ordering::SeqCst) {
                    break;
                }
                let (accepting, serve) = (Arc::clone(&accepting), Arc::clone(&serve));
                // A client that hangs up early, or does not trust the certificate, is the client's business.
                thread::spawn(move || drop(accepting.serve(stream, peer, &*serve)));
            }
        });
        Ok(Self { address, open, thread: Some(thread) })
    }
}

impl Open {
    fn serve(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        serve: impl Fn(TcpStream) -> io::Result<()>,
    ) -> io::Result<()> {
        stream.set_nodelay(true)?;
        locked(&self.streams).insert(peer, stream.try_clone()?);
        let result = if self.stopping.load(Ordering::SeqCst) { Ok(()) } else { serve(stream) };
        locked(&self.streams).remove(&peer);
        result
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.open.stopping.store(true, Ordering::SeqCst);
        // Wakes the thread, whose listener then closes.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in locked(&self.open.streams).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
