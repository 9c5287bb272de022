//! The binary: glue around [`router_server::main_from`], which the Python wheel's console script calls too.

fn main() -> std::process::ExitCode {
    router_server::main_from(std::env::args_os())
}
