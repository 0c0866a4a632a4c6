from lolcats_cli.main import main

main()
