//! CRIU's page-server protocol, sending: pages of complete images to `criu lazy-pages`, which requests those
//! that the restored process touches, and meanwhile all others.

use crate::file_error::FileError;
use crate::image::chain::{images, levels, newest_round};
use crate::image::index::{Index, Pages};
use pageferry_common::criu::page_server::{
    Command, HEADER_MAX, Header, HeaderReader, PageLocation, UnknownCommand, Width,
};
use pageferry_common::{CHUNK_PAGES, CHUNK_SIZE, ImageId, PAGE_SIZE};
use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

/// Private memory of every process in a directory of images.
#[derive(Debug)]
pub struct Served {
    /// By PID.
    processes: BTreeMap<u32, Pages>,
}

/// How a client ended that was served without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientEnd {
    /// Number of pages sent.
    pub pages: u64,
    /// Whether the client reported that it has all pages, instead of just closing the connection.
    pub complete: bool,
}

/// Why a client is no longer served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The images cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The client sent an unknown command.
    #[error("the peer violated the protocol")]
    Unknown(#[from] UnknownCommand),
    /// The client dumps instead of requesting pages.
    #[error("the client tries to send pages: that is what `receive --listen` is for")]
    Sends,
    /// The requested process is not in the images.
    #[error("the client requests pages of process {0}, which is not in the images")]
    NoProcess(u64),
    /// The requested pages are not in the images.
    #[error(
        "the client requests pages of process {pid} at {address:#x}, which are not in the images"
    )]
    NoPages {
        /// PID of the process.
        pid: u32,
        /// Address of the first page.
        address: u64,
    },
}

impl Served {
    /// Opens the pages of every process in `dir`, a directory of images or of a migration (then its newest
    /// round). Pages may be in any directory of the chain.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn load(dir: &Path) -> Result<Self, FileError> {
        let top = newest_round(dir)?;
        let chain = levels(&top)?;
        let mut processes = BTreeMap::new();
        for image in images(&top)? {
            // Shared segments are restored before any process runs, and never requested.
            if let ImageId::Process(pid) = image
                && let Some(index) = Index::load(&chain, image)?
            {
                processes.insert(pid, Pages::open(&chain, image, index)?);
            }
        }
        Ok(Self { processes })
    }

    /// Returns the number of processes.
    #[must_use]
    pub fn processes(&self) -> usize {
        self.processes.len()
    }

    /// Serves a client until it has all pages or closes the connection.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn serve(&self, read: impl Read, mut write: impl Write) -> Result<ClientEnd, ServeError> {
        let mut reader = BufReader::new(read);
        let mut buffer = vec![0; HEADER_MAX + CHUNK_SIZE];
        let mut headers = HeaderReader::default();
        let infer = |first: &Header| self.infer_width(first);
        let mut sent = 0;
        while let Some(header) = headers.read::<ServeError>(&mut reader, infer)? {
            match header.command {
                Command::Get => {
                    let answer = self.answer(header, headers.width(), &mut buffer)?;
                    write.write_all(answer)?;
                    sent += answer.len() as u64 / PAGE_SIZE;
                }
                Command::Close => {
                    write.write_all(&0i32.to_le_bytes())?;
                    return Ok(ClientEnd {
                        pages: sent,
                        complete: true,
                    });
                }
                Command::Open { .. } | Command::HasParent | Command::Add(_) => {
                    return Err(ServeError::Sends);
                }
            }
        }
        Ok(ClientEnd {
            pages: sent,
            complete: false,
        })
    }

    /// Infers the width from the first request, decoded as a narrow one. That ends with the PID, where a wide one
    /// has the address, which is never as low as a PID.
    fn infer_width(&self, first: &Header) -> Width {
        match u32::try_from(first.object).is_ok_and(|pid| self.has(pid)) {
            true => Width::Narrow,
            false => Width::Wide,
        }
    }

    fn has(&self, pid: u32) -> bool {
        self.processes.contains_key(&pid)
    }

    /// Reads the requested pages, or the first of them, into `buffer`. Returns the answer to send.
    fn answer<'a>(
        &self,
        request: Header,
        width: Width,
        buffer: &'a mut [u8],
    ) -> Result<&'a [u8], ServeError> {
        let pid = u32::try_from(request.object).ok();
        let process = pid.and_then(|pid| Some((pid, self.processes.get(&pid)?)));
        let (pid, pages) = process.ok_or(ServeError::NoProcess(request.object))?;
        let most = (request.pages.min(CHUNK_PAGES as u64) * PAGE_SIZE) as usize;
        let address = request.address;
        let pages = match address.is_multiple_of(PAGE_SIZE) {
            true => pages.read(address, &mut buffer[HEADER_MAX..][..most])?,
            false => 0,
        };
        if pages == 0 {
            return Err(ServeError::NoPages { pid, address });
        }
        let mut head = Vec::with_capacity(HEADER_MAX);
        let header = Header {
            command: Command::Add(PageLocation::Present { lazy: false }),
            pages,
            ..request
        };
        header.encode(width, &mut head);
        let start = HEADER_MAX - head.len();
        buffer[start..HEADER_MAX].copy_from_slice(&head);
        Ok(&buffer[start..HEADER_MAX + (pages * PAGE_SIZE) as usize])
    }
}
